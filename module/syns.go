// SPDX-License-Identifier: Apache-2.0

package module

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/syncookie"
	"github.com/weirgate/weir/nft"
)

// memoryName is what somebody holds the memory of handshakes under that the
// kernel's program writes to.
const memoryName = "handshakes"

// kernelSYNs is who answers SYNs in the kernel (queue.syn: auto).
type kernelSYNs struct {
	sync.Mutex
	answerer *syncookie.Answerer // nil: the SYN queue alone does
	held     int                 // how many want every SYN to come to the queue
}

// openSYNs has the kernel answer SYNs where it can and may, and says so in the
// parameters of the ruleset. Else the SYN queue does.
func (m *Module) openSYNs(params *nft.Params, kernel nft.Kernel, give *undo) {
	a, err := m.answerer(*params, kernel)
	if err != nil {
		m.log.Info("SYNs are answered from the queue", "reason", err)
	}
	if a == nil {
		if m.opt.Sockets != nil {
			_ = m.opt.Sockets.Release(memoryName)
		}
		m.keepHandshakes()
		return
	}
	give.add(a.Close)
	m.syns.answerer = a
	params.SYNToLo = true
}

// answerer is nil where the kernel is not asked to answer.
func (m *Module) answerer(params nft.Params, kernel nft.Kernel) (*syncookie.Answerer, error) {
	if !m.config().KernelSYNs() {
		return nil, nil
	}
	if !kernel.SYNToLo() {
		return nil, nft.ErrNoDup
	}
	// In this order, or its time could be later than ours.
	offset := m.clock.now()
	offset -= flowstore.HostTime()
	c := syncookie.Config{
		Secret: m.secret, Mark: params.Mark, MarkMask: params.MarkMask, MSS4: clientMSS, MSS6: clientMSS, Offset: offset,
	}
	if m.opt.Sockets != nil {
		c.Memory, _ = m.opt.Sockets.Inherited(memoryName)
	}
	inherited := c.Memory > 0
	a, err := syncookie.New(c)
	if err != nil && inherited {
		m.log.Warn("the predecessor's memory of handshakes is of no use", "error", err)
		inherited, c.Memory = false, 0
		a, err = syncookie.New(c)
	}
	if err != nil {
		return nil, err
	}
	if !m.keep.heir {
		// Of a predecessor's packets none waits for this. Those of a successor do,
		// and its predecessor could.
		if err := a.Load(); err != nil {
			return nil, errors.Join(err, a.Close())
		}
	}
	mem, fd := a.Memory()
	if err := m.handshake.Share(mem); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	if m.opt.Sockets != nil && !inherited {
		if err := m.opt.Sockets.Hold(memoryName, fd); err != nil {
			m.log.Warn("nobody holds the memory of handshakes for a successor", "error", err)
		}
	}
	if m.keep.heir && !inherited {
		// What the predecessor answered is not known: its cookies count without.
		m.handshake.Strict.Store(false)
		time.AfterFunc(engine.CookieLife, func() { m.handshake.Strict.Store(true) })
	}
	return a, nil
}

// attachSYNs begins, when rules and engines are there.
func (m *Module) attachSYNs() error {
	if m.syns.answerer == nil {
		return nil
	}
	m.tellSYNs()
	return m.syns.answerer.Attach()
}

// tellSYNs tells the kernel whose SYNs it is to answer: those to the VIPs of farms
// that take connections.
func (m *Module) tellSYNs() {
	m.syns.Lock()
	defer m.syns.Unlock()
	if m.syns.answerer == nil {
		return
	}
	var vips []netip.AddrPort
	if m.syns.held == 0 && !m.handshake.Stopped.Load() {
		ready := *m.ready.Load()
		m.db.Load().EachVIP(func(vip packet.Endpoint, farm uint16) {
			if ready[farm] {
				vips = append(vips, vip.AddrPort())
			}
		})
	}
	if err := m.syns.answerer.Update(vips); err != nil {
		m.log.Error("the kernel is not told whose SYNs it answers; restart with queue.syn: queue", "error", err)
	}
}

// holdSYNs has every SYN come to the queue, where it can be watched, until the
// function that it returns is called.
func (m *Module) holdSYNs() (release func()) {
	add := func(n int) {
		m.syns.Lock()
		m.syns.held += n
		m.syns.Unlock()
		m.tellSYNs()
	}
	add(1)
	return sync.OnceFunc(func() { add(-1) })
}
