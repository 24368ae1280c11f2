// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/nft"
)

// Names of the events about the rules of this instance and of others.
const (
	EventRulesRestored  = "rules-restored"  // somebody removed or changed our table; it is back
	EventRulesLost      = "rules-lost"      // and it could not be put back yet
	EventRulesUnguarded = "rules-unguarded" // such a gap would end connections
	EventForeignRules   = "foreign-rules"   // rules of others stand in our way
	EventSysctlsReset   = "sysctls-reset"   // somebody undid a sysctl that we need
)

// ownership is the kernel as the configuration wants it used.
func (m *Module) ownership(k nft.Kernel) nft.Kernel {
	k.Owner = k.Owner && m.config().Firewall.Owned != "never"
	return k
}

// watchRules keeps the installed rules in force, and tells of rules of others
// that stand in our way.
func (m *Module) watchRules(give *undo) error {
	w, err := m.firewall.Watcher()
	if err != nil {
		return err
	}
	m.watcher = w
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := w.Run(ctx, m.ruleEvent); err != nil {
			m.log.Error("the rules are not watched any more", "error", err)
		}
	}()
	give.add(func() error {
		cancel()
		<-ended
		return w.Close()
	})
	return nil
}

// lookAtSysctls is how often it is made sure that the sysctls still say what
// they have to. The kernel tells of few of them.
const lookAtSysctls = time.Second

// keepSysctls sets again what somebody has undone: another instance on this
// host that restored at its end what it had found at its start, or a program
// that loads a file of sysctls. What stands there now is what the end restores.
func (m *Module) keepSysctls(ctx context.Context) {
	t := time.NewTicker(lookAtSysctls)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		m.op.Lock()
		params := m.op.params
		err := m.onThread(ctx, func() error {
			names := nft.Unmet(m.needs)
			if len(names) == 0 {
				return nil
			}
			e := control.Event{Name: EventSysctlsReset, Level: control.LevelWarn, Text: fmt.Sprintf(
				"somebody has set %s, which is set again as needed", strings.Join(names, ", "))}
			err := m.changeRules(&params)
			if err != nil {
				e.Level, e.Text = control.LevelError, fmt.Sprintf("somebody has set %s, which cannot be set again: %v", strings.Join(names, ", "), err)
			}
			m.event(e)
			return err
		})
		if err == nil {
			m.op.params = params
		}
		m.op.Unlock()
	}
}

// finishLocal makes the checksum of a rewritten super-packet to an address of
// this host. One that is forwarded gets its checksums when it is cut; here the
// kernel verifies the packet as it is.
func (m *Module) finishLocal(data []byte) {
	p, problem := packet.ParseTCP(data)
	if problem == packet.OK && m.local.Has(p.Dst().Addr) {
		p.FillChecksum()
	}
}

// leaveRules removes the rules. After an orderly stop with firewall.on_stop:
// direct, a plain translation of every VIP to one server takes their place.
func (m *Module) leaveRules() error {
	if *m.state.Load() != control.Stopping || m.config().Firewall.OnStop != "direct" {
		return m.firewall.Remove()
	}
	var list []nft.Direct
	for i := range m.config().Farms {
		f := &m.config().Farms[i]
		for _, vip := range f.Listen {
			if d, ok := m.direct(f, vip); ok {
				list = append(list, d)
			}
		}
	}
	err := m.firewall.RemoveTo(list)
	if err != nil {
		m.log.Error("the rules are removed, and nothing takes their place", "error", err)
		return m.firewall.Remove()
	}
	for _, d := range list {
		m.log.Info("new connections go to one server until the next start", "vip", d.VIP, "server", d.Server)
	}
	return nil
}

// direct chooses the server that a VIP's connections go to while no instance
// runs: the first that is usable, backups last, of the VIP's own family.
func (m *Module) direct(c *config.Farm, vip netip.AddrPort) (nft.Direct, bool) {
	f := m.db.Load().FarmByName(c.Name)
	if f == nil {
		return nft.Direct{}, false
	}
	var best *farm.Server
	rank := func(s *farm.Server) int {
		n := 0
		if s.Backup {
			n++
		}
		if !s.Live.Usable(m.clock.now()) {
			n += 2
		}
		return n
	}
	for _, s := range f.Servers {
		a := s.Endpoint.AddrPort()
		if a.Addr().Is4() == vip.Addr().Is4() && (best == nil || rank(s) < rank(best)) {
			best = s
		}
	}
	if best == nil {
		m.log.Warn("on_stop: direct: no server has an address of the VIP's family", "farm", c.Name, "vip", vip)
		return nft.Direct{}, false
	}
	d := nft.Direct{VIP: vip, Server: best.Endpoint.AddrPort()}
	for _, a := range m.config().Source.Addresses {
		if !d.SNIP.IsValid() && a.Is4() == vip.Addr().Is4() {
			d.SNIP = a
		}
	}
	return d, true
}

func (m *Module) ruleEvent(e nft.Event) {
	by := "somebody"
	if e.By != "" {
		by = "the program " + e.By
	}
	switch e.Kind {
	case nft.Restored:
		m.event(control.Event{Name: EventRulesRestored, Level: control.LevelWarn, Text: fmt.Sprintf(
			"%s removed or changed the table inet %s; it was put back within %v", by, m.config().Firewall.Table, e.Took.Round(time.Millisecond))})
	case nft.NotRestored:
		m.event(control.Event{Name: EventRulesLost, Level: control.LevelError, Text: fmt.Sprintf(
			"%s removed or changed the table inet %s, and it cannot be put back: %v", by, m.config().Firewall.Table, e.Err)})
	case nft.Unguarded:
		m.event(control.Event{Name: EventRulesUnguarded, Level: control.LevelWarn, Text: fmt.Sprintf(
			"a foreign flush of the rules would end connections: the table is not owned, and %v", e.Err)})
	case nft.OthersChanged:
		m.foreign.Store(int32(len(e.Findings)))
		if len(e.Findings) == 0 {
			m.event(control.Event{Name: EventForeignRules, Level: control.LevelInfo, Text: "no rules of others stand in the way any more"})
		}
		for i := range e.Findings {
			f := &e.Findings[i]
			m.event(control.Event{Name: EventForeignRules, Level: control.LevelWarn, Text: f.String() + "; " + f.Fix})
		}
	}
}
