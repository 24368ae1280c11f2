// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirgate/weir/policies"
	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// Defaults of PluginSpec for questions.
const (
	DefaultAskDeadline    = 5 * time.Millisecond
	DefaultAskConcurrency = 64

	// After so many questions in a row without an answer the plugin is not
	// asked for a while; then one question tries whether it is back.
	breakAfter = 20
	breakFor   = time.Second
)

// Reasons why a question has no answer. Errors of the plugin itself are others.
var (
	ErrNotAsked = errors.New("the plugin does not run, or is not one to be asked")
	ErrBusy     = errors.New("too many questions are open")
	ErrBroken   = errors.New("the plugin has not answered lately and is given a rest")
	ErrLate     = errors.New("the answer did not come in time")
)

// Decisions counts the questions to a plugin, since the host began.
type Decisions struct {
	Asked    uint64 `json:"asked"`    // all of the others together
	Answered uint64 `json:"answered"` // in time
	Late     uint64 `json:"late"`
	Failed   uint64 `json:"failed"`  // answered by an error, or by nonsense
	Busy     uint64 `json:"busy"`    // not sent: as many were open as may be
	Refused  uint64 `json:"refused"` // not sent: none runs, or a rest
}

// asker bounds what a plugin is asked. It outlives the plugin's processes.
type asker struct {
	answered, late, failed, busy, refused atomic.Uint64
	open                                  atomic.Int64

	mu    sync.Mutex // guards what follows
	fails int        // in a row
	rest  time.Time  // until then nothing is asked
	probe bool       // one question tries, the others wait
}

// admit says whether a question may be asked now.
func (a *asker) admit(now time.Time, most int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fails >= breakAfter {
		if now.Before(a.rest) || a.probe {
			return ErrBroken
		}
		a.probe = true
	}
	if a.open.Add(1) > int64(most) {
		a.open.Add(-1)
		a.probe = false
		return ErrBusy
	}
	return nil
}

// done takes the outcome of a question that was admitted.
func (a *asker) done(now time.Time, err error) {
	a.open.Add(-1)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.probe = false
	if err == nil {
		a.fails = 0
		return
	}
	if a.fails++; a.fails >= breakAfter {
		a.rest = now.Add(breakFor)
	}
}

func (a *asker) count() Decisions {
	d := Decisions{Answered: a.answered.Load(), Late: a.late.Load(), Failed: a.failed.Load(), Busy: a.busy.Load(), Refused: a.refused.Load()}
	d.Asked = d.Answered + d.Late + d.Failed + d.Busy + d.Refused
	return d
}

// Ask asks a plugin about a request and returns its answer and how long that
// holds, within the plugin's deadline. It may be called by many goroutines.
func (h *Host) Ask(ctx context.Context, farm, plugin string, q *policies.Question) (*snapshot.Answer, time.Duration, error) {
	s := h.current(plugin)
	if s == nil {
		return nil, 0, ErrNotAsked
	}
	s.mu.Lock()
	p, key, deadline, most := s.proc, s.askKey, s.spec.askDeadline, s.spec.askConcurrency
	s.mu.Unlock()
	if p == nil || key == nil {
		s.asks.refused.Add(1)
		return nil, 0, ErrNotAsked
	}
	if err := s.asks.admit(time.Now(), most); err != nil {
		if errors.Is(err, ErrBusy) {
			s.asks.busy.Add(1)
		} else {
			s.asks.refused.Add(1)
		}
		return nil, 0, err
	}
	answer, ttl, err := s.ask(ctx, p, deadline, policies.QuestionToProto(farm, q))
	s.asks.done(time.Now(), err)
	switch {
	case err == nil:
		s.asks.answered.Add(1)
	case errors.Is(err, ErrLate):
		s.asks.late.Add(1)
	default:
		s.asks.failed.Add(1)
	}
	return answer, ttl, err
}

func (s *supervisor) ask(ctx context.Context, p *process, deadline time.Duration, q *policypb.DecideRequest) (*snapshot.Answer, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	resp, err := p.calls.Ask.Decide(ctx, q)
	if err != nil {
		if c := status.Code(err); c == codes.DeadlineExceeded || c == codes.Canceled {
			return nil, 0, ErrLate
		}
		return nil, 0, errors.New(status.Convert(err).Message())
	}
	return policies.AnswerFromProto(resp)
}
