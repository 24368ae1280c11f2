// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
)

// operator is the module as its control socket sees it.
type operator struct{ *Module }

var _ control.Operator = operator{}

// changeTime bounds a change that an operator asks for.
const changeTime = time.Minute

// changing is the context of a change: one that has begun is finished even if
// the caller goes away.
func (o operator) changing(ctx context.Context) (context.Context, context.CancelFunc) {
	select {
	case <-o.serving:
		ctx = o.life
	default:
	}
	return context.WithTimeout(ctx, changeTime)
}

// Reload implements control.Operator.
func (o operator) Reload(ctx context.Context) (*control.ReloadResult, error) {
	ctx, cancel := o.changing(ctx)
	defer cancel()
	return o.ReloadFiles(ctx, whyCaller)
}

// Plan implements control.Operator.
func (o operator) Plan(_ context.Context, dump []byte) (*control.PlanResult, error) {
	next, err := config.Parse("the configuration that was sent", dump)
	if err != nil {
		return nil, err
	}
	o.op.Lock()
	defer o.op.Unlock()
	kept, _ := keptOverrides(o.op.overrides, next)
	return &control.PlanResult{Changes: config.Compare(o.op.file, next), Overrides: kept}, nil
}

// ChangeServer implements control.Operator.
func (o operator) ChangeServer(ctx context.Context, farm, server string, c control.ServerChange) (*control.Override, error) {
	ctx, cancel := o.changing(ctx)
	defer cancel()
	return o.Module.ChangeServer(ctx, farm, server, c)
}

// AddServer implements control.Operator.
func (o operator) AddServer(ctx context.Context, farm string, s control.ServerSpec) (*control.Override, error) {
	ctx, cancel := o.changing(ctx)
	defer cancel()
	return o.Module.AddServer(ctx, farm, s)
}

// RemoveServer implements control.Operator.
func (o operator) RemoveServer(ctx context.Context, farm, server string, persist bool) (*control.Override, error) {
	ctx, cancel := o.changing(ctx)
	defer cancel()
	return o.Module.RemoveServer(ctx, farm, server, persist)
}

// DropOverrides implements control.Operator.
func (o operator) DropOverrides(ctx context.Context, farm, server string) (int, error) {
	ctx, cancel := o.changing(ctx)
	defer cancel()
	return o.Module.DropOverrides(ctx, farm, server)
}

// Events implements control.Operator.
func (o operator) Events() *control.Events { return &o.events }

// Rules implements control.Operator.
func (o operator) Rules(context.Context) (string, error) {
	if o.firewall == nil {
		return "", errNotServing
	}
	return o.firewall.Ruleset().Text(), nil
}

// Kill resets a client's connections to a VIP, to all VIPs if that is not
// valid.
func (o operator) Kill(ctx context.Context, client, vip netip.AddrPort) (int, error) {
	vips := []netip.AddrPort{vip}
	if !vip.IsValid() {
		o.op.Lock()
		vips = slices.Clone(o.op.params.VIPs)
		o.op.Unlock()
	}
	n := 0
	for _, v := range vips {
		err := o.engines(ctx, func(_ int, s *shard, now int64) {
			if s.engine.Kill(now, packet.EndpointFrom(client), packet.EndpointFrom(v), &s.out) {
				n++
			}
		})
		if err != nil {
			return n, err
		}
	}
	if n > 0 {
		o.event(control.Event{Name: control.EventFlowKilled, Count: uint64(n), Text: fmt.Sprintf("connections of client %s are killed", client)})
	}
	return n, nil
}

// flowsAtOnce is how many flows are copied between two batches of packets.
const flowsAtOnce = 512

// Flows implements control.Operator.
func (o operator) Flows(ctx context.Context, want control.FlowFilter, emit func(*control.Flow) error) error {
	list := make([]engine.Flow, 0, flowsAtOnce)
	var flow control.Flow
	var names flowNames
	sent, shard := 0, -1
	for _, s := range o.shards {
		if s.role != roleShard {
			continue
		}
		shard++
		for from := splice.Ref(0); ; {
			var at int64
			err := s.do(ctx, func(now int64) {
				at = now
				list, from = s.engine.Flows(from, list[:0])
			})
			if err != nil {
				return err
			}
			names.db = o.db.Load()
			for i := range list {
				if !fits(&want, &list[i]) {
					continue
				}
				names.flow(&flow, &list[i], shard, at)
				if want.Farm != "" && flow.Farm != want.Farm || want.Server != "" && flow.Server != want.Server || want.State != "" && flow.State != want.State {
					continue
				}
				if err := emit(&flow); err != nil {
					return err
				}
				if sent++; sent == want.Limit {
					return nil
				}
			}
			if from == 0 {
				break
			}
		}
	}
	return nil
}

// fits checks what needs no names.
func fits(want *control.FlowFilter, f *engine.Flow) bool {
	if want.Port != 0 && f.Client.Port != want.Port || want.VIP.IsValid() && f.VIP.AddrPort() != want.VIP {
		return false
	}
	return !want.Client.IsValid() || want.Client.Contains(f.Client.Addr.Netip())
}

// flowNames turns numbers into words. Addresses that come again and again are
// written once.
type flowNames struct {
	db    *farm.DB
	texts map[packet.Endpoint]string
}

func (n *flowNames) text(e packet.Endpoint) string {
	if n.texts == nil {
		n.texts = map[packet.Endpoint]string{}
	}
	s, ok := n.texts[e]
	if !ok {
		s = e.String()
		n.texts[e] = s
	}
	return s
}

func (n *flowNames) flow(out *control.Flow, f *engine.Flow, shard int, now int64) {
	*out = control.Flow{
		Client: f.Client.String(), VIP: n.text(f.VIP), State: f.State.String(),
		AgeMS: (now - f.Started) / 1e6, IdleMS: (now - f.Last) / 1e6, Held: f.Held,
		Added: int(f.Epoch.InsLen), Attempts: int(f.Attempts), Shard: shard,
	}
	if f.Waiting {
		out.State = "waiting"
	}
	if f.Attempts > 0 || f.State != splice.ClientHead {
		out.Method = f.Method.String()
	}
	if fm := n.db.FarmByID(f.Farm); fm != nil {
		out.Farm = fm.Name
	}
	if f.Server != 0 {
		if sv := n.db.Server(f.Server); sv != nil {
			out.Server = sv.Name
		}
		out.Remote, out.SNIP, out.ServerState = n.text(f.Remote), f.SNIP.String(), f.ServerState.String()
	}
}

// Pools implements control.Operator.
func (o operator) Pools(ctx context.Context) ([]control.Pool, error) {
	db := o.db.Load()
	pools := map[uint16]*control.Pool{}
	list := make([]engine.Conn, 0, flowsAtOnce)
	var now int64
	for _, s := range o.shards {
		if s.role != roleShard {
			continue
		}
		for from := splice.Ref(0); ; {
			err := s.do(ctx, func(at int64) {
				now = at
				list, from = s.engine.Conns(from, list[:0])
			})
			if err != nil {
				return nil, err
			}
			for i := range list {
				c := &list[i]
				p := pools[c.Server]
				if p == nil {
					p = &control.Pool{}
					pools[c.Server] = p
				}
				count(p, c, now)
			}
			if from == 0 {
				break
			}
		}
	}
	var out []control.Pool
	add := func(f *farm.Farm, s *farm.Server) {
		p := pools[s.ID]
		if p == nil {
			p = &control.Pool{}
		}
		c := control.CountServer(s)
		p.Farm, p.Server, p.Address, p.State = f.Name, s.Name, c.Address, c.State
		p.Waiting = int(f.Stats.Waiting.Load())
		p.MaxIdle, p.MaxConnections = int(f.Pool.MaxIdle), int(f.Pool.MaxConnections)
		p.Opened, p.Reused, p.Closed = c.Opened, c.Reused, c.Closed
		out = append(out, *p)
	}
	for _, f := range db.Farms {
		for _, s := range f.Servers {
			add(f, s)
		}
	}
	for _, s := range db.Draining {
		add(s.Farm, s)
	}
	return out, nil
}

func count(p *control.Pool, c *engine.Conn, now int64) {
	switch c.State {
	case splice.ServerConnecting:
		p.Connecting++
	case splice.ServerIdle:
		p.Idle++
		p.OldestIdleMS = max(p.OldestIdleMS, (now-c.Idle)/1e6)
	case splice.ServerActive:
		p.Active++
	case splice.ServerDraining:
		p.Draining++
	case splice.ServerClosing:
		p.Closing++
	}
	p.OldestMS = max(p.OldestMS, (now-c.Opened)/1e6)
}

// traceBuffer bounds the records that wait for a reader.
const traceBuffer = 4096

// Trace implements control.Operator.
func (o operator) Trace(ctx context.Context, want control.TraceFilter, emit func(*control.TraceRecord) error) error {
	if !want.Client.IsValid() {
		return control.Invalid("expected the address of a client")
	}
	if !o.op.tracing.CompareAndSwap(false, true) {
		return control.Conflict("another trace is running")
	}
	defer o.op.tracing.Store(false)
	type record struct {
		shard int
		p     engine.Passage
		lost  uint64
	}
	records := make(chan record, traceBuffer)
	defer o.holdSYNs()()
	shard := -1
	var tapped []*shardTap
	defer func() {
		for _, t := range tapped {
			// Without a tap again; it fails only at the end of the instance.
			_ = t.s.do(context.WithoutCancel(ctx), func(int64) { t.s.tap = nil })
		}
	}()
	for _, s := range o.shards {
		if s.role == roleControl {
			continue
		}
		t := &shardTap{s: s}
		number := -1
		if s.role == roleShard {
			shard++
			number = shard
		}
		tap := &engine.Tap{
			Client: func(a packet.Addr) bool { return want.Client.Contains(a.Netip()) },
			Record: func(p engine.Passage) {
				// The thread of the packets never waits.
				select {
				case records <- record{number, p, t.lost}:
					t.lost = 0
				default:
					t.lost++
				}
			},
		}
		if err := s.do(ctx, func(int64) { s.tap = tap }); err != nil {
			return err
		}
		tapped = append(tapped, t)
	}
	src := &o.config().Source
	first := &control.TraceRecord{Time: time.Now(), Shard: -1, SNIPs: src.Addresses, SNIPPorts: []uint16{src.Ports.Low, src.Ports.High}}
	if err := emit(first); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-records:
			if err := emit(o.traced(r.shard, &r.p, r.lost, want.Snap)); err != nil {
				return err
			}
		}
	}
}

// shardTap is a shard with a tap; lost is of the shard's thread.
type shardTap struct {
	s    *shard
	lost uint64
}

func (o operator) traced(shard int, p *engine.Passage, lost uint64, snap int) *control.TraceRecord {
	cut := func(b []byte) control.Bytes {
		if snap > 0 && len(b) > snap {
			b = b[:snap]
		}
		return b
	}
	t := &control.TraceRecord{Time: time.Unix(0, p.Now), Shard: shard, In: cut(p.In), Lost: lost}
	for _, b := range p.Out {
		t.Out = append(t.Out, cut(b))
	}
	for _, r := range p.Reasons {
		t.Reasons = append(t.Reasons, r.String())
	}
	if sv := o.db.Load().Server(p.Decided); sv != nil {
		t.Farm, t.Server = sv.Farm.Name, sv.Name
	}
	return t
}

// waitingFor says what Status reports of the configuration.
func (m *Module) waitingFor() (reasons []string) {
	m.op.seen.Lock()
	defer m.op.seen.Unlock()
	if m.op.seen.refused != "" {
		reasons = append(reasons, "the configuration's files are refused, an older state is in force: "+m.op.seen.refused)
	}
	if len(m.op.seen.waiting) > 0 {
		reasons = append(reasons, "changes that wait for a restart: "+strings.Join(m.op.seen.waiting, ", "))
	}
	return reasons
}
