// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// This file is what policies need of the engine beside the choice itself: the
// fields that they look at, the bytes that count against their budgets, and a
// timer for requests that wait for something which no packet announces.

// fields returns the values of the fields that the Selector looks at. The head
// was scanned for the set that was in use when its first byte came; where that
// lacks a name, it is scanned again.
func (e *Engine) fields(f *farm.Farm, sel *snapshot.Selector, c *splice.Client, d *side) [][]byte {
	names := sel.Fields()
	if len(names) == 0 {
		return nil
	}
	h, want := &d.req, d.want
	for _, n := range names {
		if want == nil || want.Index(n) < 0 {
			if now := f.Wanted.Load(); now != want {
				want, h = now, &e.rescan
				h.Reset()
				h.Scan(d.held[:c.HeadLen], e.limits(c.Farm), want)
			}
			break
		}
	}
	out := e.values[:0]
	for _, n := range names {
		var v []byte
		if want != nil {
			if i := want.Index(n); i >= 0 && h.Counts[i] > 0 {
				v = h.Spans[i].Of(d.held)
			}
		}
		out = append(out, v)
	}
	return out
}

// noted counts what came of a choice, policy by policy.
func noted(f *farm.Farm, c *snapshot.Choice) {
	if i := int(c.Policy); i < len(f.PolicyStats) {
		f.PolicyStats[i].Decided.Add(1)
	}
	if c.Emptied|c.Skipped|c.Compared == 0 {
		return
	}
	for i, st := range f.PolicyStats {
		bit := uint32(1) << i
		if c.Emptied&bit != 0 {
			st.Emptied.Add(1)
		}
		if c.Skipped&bit != 0 {
			st.Skipped.Add(1)
		}
		if c.Compared&bit != 0 {
			st.Compared.Add(1)
		}
		if c.Disagreed&bit != 0 {
			st.Disagreed.Add(1)
		}
	}
}

// spend counts payload bytes against the budgets of a connection's server.
func (e *Engine) spend(v *splice.Server, n int64) {
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Live.Spent.Add(n)
		sv.Farm.Stats.Live.Spent.Add(n)
	}
}

// reserve counts the rest of a response against the budgets when its length is
// known: the next choice has to know what is certain to come. Its bytes do not
// count again as they pass.
func (e *Engine) reserve(v *splice.Server) {
	if v.Flags&splice.ServerBudgeted != 0 && v.Resp.Body == http1.BodyLength {
		v.Flags |= splice.ServerReserved
		e.spend(v, int64(min(v.Resp.Length, 1<<50)))
	}
}

// refund gives back what was reserved and will not come.
func (e *Engine) refund(v *splice.Server) {
	if v.Flags&splice.ServerReserved == 0 {
		return
	}
	v.Flags &^= splice.ServerReserved
	left := v.Body.Known()
	if v.Flags&splice.ServerRespEnd != 0 {
		if left = 0; v.RcvNxt.Less(v.RespEnd) {
			left = uint64(v.RcvNxt.To(v.RespEnd))
		}
	}
	e.spend(v, -int64(min(left, v.Resp.Length, 1<<50)))
}

// unacknowledged is until when the server has to acknowledge something of the
// request; after that it is silent. never, if it has.
func (e *Engine) unacknowledged(c *splice.Client, v *splice.Server) int64 {
	if v.SndBase.Less(v.SndUna) || v.SndNxt == v.SndBase || c.Flags&splice.ClientResponded != 0 {
		return never
	}
	return e.since(v.Bound) + e.timeouts(c.Farm).Connect
}

// seen takes what a server's segment tells about the path to it.
func (e *Engine) seen(v *splice.Server, seq, end packet.Seq) {
	sv := e.db.Server(v.ID)
	if sv == nil {
		return
	}
	n := uint64(seq.To(end))
	sv.Stats.BytesOut.Add(n)
	sv.Farm.Stats.BytesOut.Add(n)
	if v.Flags&(splice.ServerBudgeted|splice.ServerReserved) == splice.ServerBudgeted {
		e.spend(v, int64(n))
	}
}

// headSeen counts a response head: how long it took, and whether the server
// says that it failed.
func (e *Engine) headSeen(c *splice.Client, v *splice.Server) {
	sv := e.db.Server(v.ID)
	if sv == nil {
		return
	}
	sv.Stats.FirstByte.Add(e.now - v.Bound)
	sv.Stats.Latency.Add(e.now - c.Started)
	if v.Resp.Status >= 500 {
		sv.Stats.ServerErrors.Add(1)
	}
}

// repeated counts a segment that a client sent again.
func (e *Engine) repeated(c *splice.Client, v *splice.Server) {
	if f := e.db.FarmByID(c.Farm); f != nil {
		f.Stats.Retransmitted.Add(1)
	}
	if v == nil {
		return
	}
	if sv := e.db.Server(v.ID); sv != nil {
		sv.Stats.RequestRetransmitted.Add(1)
	}
}

// retryEvery is how often requests are chosen for again that wait for a policy:
// for a budget that is earned back, for a server that becomes eligible.
const retryEvery = 20 * millisecond

func (e *Engine) policyTimer() uint32 { return uint32(e.opt.Clients+e.opt.Servers) + 3 }

// waitForPolicy puts a request into the farm's line, and has the line looked at
// again soon.
func (e *Engine) waitForPolicy(r splice.Ref, c *splice.Client, f *farm.Farm) bool {
	left := e.wait(r, c, f)
	if l := e.waits[f.ID]; l != nil && c.Flags&splice.ClientWaiting != 0 {
		l.retry = true
		e.armPolicyTimer(retryEvery)
	}
	return left
}

func (e *Engine) armPolicyTimer(d int64) {
	if at := e.wheel.at(e.policyTimer()); at == 0 || e.now+d < at {
		e.wheel.set(e.policyTimer(), e.now+d)
	}
}

// retryPolicies is what the timer does.
func (e *Engine) retryPolicies() {
	for _, f := range e.db.Farms {
		l := e.waits[f.ID]
		if l == nil || !l.retry {
			continue
		}
		if l.n == 0 {
			l.retry = false
			continue
		}
		e.wakes = append(e.wakes, f.ID)
		e.armPolicyTimer(retryEvery)
	}
	e.giveUpAsking()
}
