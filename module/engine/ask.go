// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"slices"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// This file is the engine's side of asking plugins about requests. The engine
// never waits: a request for which an answer is missing stays in BINDING, the
// question goes out with the Output of the step, and whoever asks the plugin
// calls Answer between two batches, with the answer or without one. Requests
// that ask the same share a question, and answers are kept for as long as they
// hold.

// Question is what a plugin is to be asked.
type Question struct {
	ID     uint64 // for Answer; counts up, from 1
	Farm   *farm.Farm
	Policy string // the policy's name
	Key    []byte // see snapshot.AskKey.ParseKey; nobody else's

	// Attempt counts from 1. From the second on, Tried are the servers where
	// the request has been.
	Attempt int
	Tried   []string
}

// Ban is a client that a policy wants to be kept away.
type Ban struct {
	Client  packet.Addr
	Seconds uint32
}

const (
	// maxAnswers bounds the answers that are kept, and maxQuestions those that
	// are waited for.
	maxAnswers   = 16384
	maxQuestions = 4096
	// askGrace is when the engine gives up a question of which it hears
	// nothing. Whoever asks has a deadline of his own, long before.
	askGrace = 2 * second
)

// asks are the open questions and the answers that are kept.
type asks struct {
	last   uint64
	open   map[uint64]*question
	order  []uint64          // of open, by age; may hold closed ones
	byKey  map[string]uint64 // of open questions that others may join
	kept   map[string]*heldAnswer
	oldest []string // keys of kept, by age; may hold dropped ones
	key    []byte   // scratch
}

type question struct {
	farm   uint16
	policy string
	key    string // of asks.byKey and kept; "": nobody may join, nothing is kept
	due    int64
	who    []splice.Ref
}

// heldAnswer is an answer; it never changes, but for what it is compiled to.
type heldAnswer struct {
	answer   *snapshot.Answer // nil: none came
	until    int64
	compiled *snapshot.CompiledAnswer
	sel      *snapshot.Selector // for which it is compiled
}

// answerOf is an answer that a request has got.
type answerOf struct {
	policy string
	a      *heldAnswer
}

var noAnswer = &heldAnswer{compiled: snapshot.Unanswered}

// of returns the answer in the numbers of a Selector.
func (a *heldAnswer) of(policy string, sel *snapshot.Selector) *snapshot.CompiledAnswer {
	if a.answer == nil || a.sel != nil && a.sel.SameServers(sel) {
		return a.compiled
	}
	c, err := sel.CompileAnswer(policy, a.answer)
	if err != nil {
		c = snapshot.Unanswered // it names servers that are gone
	}
	a.compiled, a.sel = c, sel
	return c
}

// answers returns what plugins have answered about a request so far.
func (e *Engine) answers(d *side, sel *snapshot.Selector) []snapshot.Answered {
	out := e.said[:0]
	for i := range d.answered {
		a := &d.answered[i]
		out = append(out, snapshot.Answered{Policy: a.policy, Answer: a.a.of(a.policy, sel)})
	}
	return out
}

// ask finds the answer of a policy about a request. It returns false when the
// request has to wait for it; dispatch is called again then.
func (e *Engine) ask(r splice.Ref, c *splice.Client, f *farm.Farm, d *side, sel *snapshot.Selector, req *snapshot.Request, index int) bool {
	policy := sel.PolicyName(index)
	st := &farm.PolicyStats{}
	if index < len(f.PolicyStats) {
		st = f.PolicyStats[index]
	}
	q := &e.asking
	if q.open == nil {
		q.open, q.byKey, q.kept = map[uint64]*question{}, map[string]uint64{}, map[string]*heldAnswer{}
	}
	key := binary.BigEndian.AppendUint16(q.key[:0], f.ID)
	key = append(key, policy...)
	key = append(key, 0)
	begin := len(key)
	key, ok := sel.AppendKey(key, index, req, &e.scratch)
	q.key = key
	if ok && len(q.open) >= maxQuestions {
		e.Count.add(ReasonAskFull)
		ok = false
	}
	if !ok {
		st.Late.Add(1)
		d.answered = append(d.answered, answerOf{policy, noAnswer})
		return true
	}
	// After a failure the servers that were tried belong to the question, and
	// the answer to this request alone.
	first := c.Attempts == 0
	if first {
		if a := q.kept[string(key)]; a != nil && e.now < a.until {
			st.Cached.Add(1)
			d.answered = append(d.answered, answerOf{policy, a})
			return true
		}
	}
	st.Asked.Add(1)
	e.leaveLine(c, f)
	e.touchClient(r, c)
	if first {
		if id := q.byKey[string(key)]; id != 0 {
			q.open[id].who = append(q.open[id].who, r)
			d.question = id
			return false
		}
	}
	q.last++
	n := &question{farm: f.ID, policy: policy, due: e.now + askGrace, who: []splice.Ref{r}}
	out := Question{ID: q.last, Farm: f, Policy: policy, Key: slices.Clone(key[begin:]), Attempt: int(c.Attempts) + 1}
	if first {
		n.key = string(key)
		q.byKey[n.key] = q.last
	} else {
		for i, sv := range f.Servers {
			if d.tried.Has(i) {
				out.Tried = append(out.Tried, sv.Name)
			}
		}
	}
	q.open[q.last] = n
	q.order = append(q.order, q.last)
	d.question = q.last
	e.armPolicyTimer(askGrace)
	e.out.Questions = append(e.out.Questions, out)
	return false
}

// Answer hands over the answer to a question; nil says that there is none. It
// holds for ttl nanoseconds. A question that is not open any more is ignored.
// Like Step it belongs to the engine's thread.
func (e *Engine) Answer(now int64, id uint64, answer *snapshot.Answer, ttl int64, out *Output) {
	if e.asking.open[id] == nil {
		return
	}
	e.act(now, out, func() { e.answerQuestion(id, answer, ttl) })
}

// Busy is Answer without one, for a question that was not asked because as many
// are open at the plugin as may be. It is counted.
func (e *Engine) Busy(now int64, id uint64, out *Output) {
	if e.asking.open[id] == nil {
		return
	}
	e.Count.add(ReasonAskBusy)
	e.Answer(now, id, nil, 0, out)
}

func (e *Engine) answerQuestion(id uint64, answer *snapshot.Answer, ttl int64) {
	q := &e.asking
	n := q.open[id]
	if n == nil {
		return
	}
	delete(q.open, id)
	if n.key != "" {
		delete(q.byKey, n.key)
	}
	f := e.db.FarmByID(n.farm)
	a := noAnswer
	if answer != nil {
		a = &heldAnswer{answer: answer, until: e.now + ttl}
		if f != nil {
			if sel := f.Selector.Load(); a.of(n.policy, sel) == snapshot.Unanswered {
				a = noAnswer // it does not fit the farm
			}
		}
	}
	if a != noAnswer && ttl > 0 && n.key != "" {
		e.keepAnswer(n.key, a)
	}
	for _, r := range n.who {
		if !e.clients.Live(r) {
			continue
		}
		c := e.clients.At(r)
		if c.State != splice.ClientBinding || c.Side == 0 || e.sides.at(c.Side).question != id {
			continue
		}
		d := e.sides.at(c.Side)
		d.question = 0
		d.answered = append(d.answered, answerOf{n.policy, a})
		if a == noAnswer && f != nil {
			f.CountLate(n.policy)
		}
		e.dispatch(r, c, nil, nil)
		e.commit()
	}
}

// keepAnswer keeps an answer and drops the oldest where there are too many.
func (e *Engine) keepAnswer(key string, a *heldAnswer) {
	q := &e.asking
	if q.kept[key] == nil {
		q.oldest = append(q.oldest, key)
	}
	q.kept[key] = a
	for len(q.oldest) > 0 && (len(q.kept) > maxAnswers || q.kept[q.oldest[0]].until <= e.now) {
		delete(q.kept, q.oldest[0])
		q.oldest[0] = ""
		q.oldest = q.oldest[1:]
	}
	if cap(q.oldest) > 4*maxAnswers {
		q.oldest = slices.Clone(q.oldest)
	}
}

// giveUpAsking closes the questions of which nothing was heard.
func (e *Engine) giveUpAsking() {
	q := &e.asking
	for len(q.order) > 0 {
		id := q.order[0]
		if n := q.open[id]; n != nil {
			if e.now < n.due {
				e.armPolicyTimer(n.due - e.now)
				return
			}
			e.answerQuestion(id, nil, 0)
		}
		q.order = q.order[1:]
	}
	q.order = nil
}
