// SPDX-License-Identifier: Apache-2.0

package module

import (
	"context"
	"errors"

	"github.com/weirgate/weir/module/farm"
)

// This file is how others reach what belongs to a thread: an engine, which is
// its shard's alone, and the kernel interfaces that act in the network
// namespace of the thread that runs the module.

const (
	// workWaiting bounds the functions that wait for a shard's thread.
	workWaiting = 64
	// workPerBatch bounds those that run between two batches of packets. Each
	// does a bounded piece of work, so that packets wait for tens of
	// microseconds at most.
	workPerBatch = 2
)

// errEnded says that the instance does not serve any more.
var errEnded = errors.New("the instance is stopping")

// do runs f on the shard's thread, between two batches, and returns when it
// is done. f must be short. It may use the engine and s.out, which is flushed
// behind it.
func (s *shard) do(ctx context.Context, f func(now int64)) error {
	done := make(chan struct{})
	select {
	case s.work <- func(now int64) { f(now); close(done) }:
	case <-s.ended:
		return errEnded
	case <-ctx.Done():
		return ctx.Err()
	}
	s.queue.Wake()
	// Even if nobody waits any more, f may still run: it must have ended
	// before its caller's memory is used for something else.
	select {
	case <-done:
		return nil
	case <-s.ended:
		select {
		case <-done:
			return nil
		default:
			return errEnded
		}
	}
}

// workOff runs what waits for this thread.
func (s *shard) workOff(db **farm.DB) {
	now := s.m.clock.now()
	s.out.Reset()
	if d := s.m.db.Load(); s.role == roleShard && d != *db {
		*db = d
		s.engine.SetDB(d)
	}
	for range workPerBatch {
		select {
		case f := <-s.work:
			f(now)
		default:
		}
	}
	s.flush()
}

// engines calls f for every shard that has an engine, on its thread, one shard
// after the other.
func (m *Module) engines(ctx context.Context, f func(i int, s *shard, now int64)) error {
	i := 0
	for _, s := range m.shards {
		if s.role != roleShard {
			continue
		}
		if err := s.do(ctx, func(now int64) { f(i, s, now) }); err != nil {
			return err
		}
		i++
	}
	return nil
}

// onThread runs f on the thread that runs the module.
func (m *Module) onThread(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	select {
	case m.calls <- func() { done <- f() }:
		return <-done
	case <-m.ended:
		return errEnded
	case <-ctx.Done():
		return ctx.Err()
	}
}
