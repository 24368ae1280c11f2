// SPDX-License-Identifier: Apache-2.0

package module

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirgate/weir/internal/filelock"
	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/nft"
)

// Sockets is somebody who holds the queues' sockets beyond the life of this
// process, so that the kernel keeps what is queued while no engine runs. Names
// are of the form queue-NUMBER.
type Sockets interface {
	// Rest lists what a predecessor left and nobody has taken.
	Rest() []string
	// Inherited gives one of these to the caller.
	Inherited(name string) (fd int, ok bool)
	// Hold leaves a copy of a descriptor to successors.
	Hold(name string, fd int) error
	// Release closes what is held, and what was inherited, under a name.
	Release(name string) error
}

const (
	queueName = "queue-"

	// dyingWait bounds the wait for a killed predecessor: its memory has to be
	// given back before its lock goes.
	dyingWait = 5 * time.Second
	dyingStep = 5 * time.Millisecond
)

// heldQueues are the numbers of the queues whose sockets a predecessor left.
func (m *Module) heldQueues() (numbers []uint16) {
	if m.opt.Sockets == nil {
		return nil
	}
	for _, name := range m.opt.Sockets.Rest() {
		if n, err := strconv.ParseUint(strings.TrimPrefix(name, queueName), 10, 16); err == nil {
			numbers = append(numbers, uint16(n))
		}
	}
	return numbers
}

// batched tells whether queues are read in batches. Only such a queue can be
// taken over.
func (m *Module) batched() bool { return m.config().Queue.Backend == "batched" }

// dropSockets gives up the inherited sockets that this configuration has no use
// for: packets that wait in them are lost, which happens after a change of
// queue.* only. It returns when the kernel has let go of the numbers.
func (m *Module) dropSockets(params nft.Params) error {
	var dropped []uint16
	for _, n := range m.heldQueues() {
		if n >= params.QueueFirst && int(n) < int(params.QueueFirst)+params.Queues() && m.batched() {
			continue
		}
		if err := m.opt.Sockets.Release(queueName + strconv.Itoa(int(n))); err != nil {
			return err
		}
		m.log.Warn("a queue of the predecessor is not used any more", "queue", n)
		dropped = append(dropped, n)
	}
	for end := time.Now().Add(dyingWait); len(dropped) > 0; time.Sleep(dyingStep) {
		left, err := divert.ReadKernelStats(dropped...)
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("queue %d: the supervisor does not let go of it", left[0].Queue)
		}
	}
	return nil
}

// openQueue opens one queue. With somebody to hold it, its socket is the one
// that a predecessor left, or a new one that is left to successors.
func (m *Module) openQueue(cfg divert.Config) (divert.Queue, error) {
	switch {
	case !m.batched():
		return divert.OpenPlain(cfg)
	case m.opt.Sockets == nil:
		return divert.OpenBatched(cfg)
	}
	name := queueName + strconv.Itoa(int(cfg.Queue))
	if fd, ok := m.opt.Sockets.Inherited(name); ok {
		cfg.FD = fd
		q, err := divert.OpenBatched(cfg)
		if !errors.Is(err, divert.ErrNotHeld) {
			return q, err
		}
		m.log.Warn("the predecessor's socket is of no use", "queue", cfg.Queue, "error", err)
		cfg.FD = 0
	}
	fd, err := divert.Bind(cfg)
	if err != nil {
		return nil, err
	}
	if err := m.opt.Sockets.Hold(name, fd); err != nil {
		m.log.Warn("nobody holds the queue for a successor", "queue", cfg.Queue, "error", err)
	}
	cfg.FD = fd
	return divert.OpenBatched(cfg)
}

// readable tells whether this program could take over what a living predecessor
// keeps. Nothing that the predecessor may be changing is looked at more closely.
func (m *Module) readable() error {
	dir := filepath.Join(m.config().RuntimeDir, "flows")
	b, err := os.ReadFile(filepath.Join(dir, "instance"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("runtime_dir: %w", err)
	}
	var old kept
	if err := unseal(b, &old); err != nil {
		return fmt.Errorf("runtime_dir: the file \"instance\" is damaged: %w", err)
	}
	if old.Version != keptVersion {
		return fmt.Errorf("what the running instance keeps is of version %d, this program knows %d", old.Version, keptVersion)
	}
	shards, err := filepath.Glob(filepath.Join(dir, "shard*"))
	if err != nil {
		return err
	}
	for _, path := range shards {
		if err := flowstore.Check(path, splice.RecordVersion); err != nil {
			return err
		}
	}
	return nil
}

// takeLock locks the runtime directory. A predecessor that is just dying is
// waited for if there is somebody who kills them.
func (m *Module) takeLock() (*filelock.Lock, error) {
	path := filepath.Join(m.config().RuntimeDir, "lock")
	wait := time.Duration(0)
	if m.opt.Sockets != nil {
		wait = dyingWait
	}
	for end := time.Now().Add(wait); ; time.Sleep(dyingStep) {
		lock, err := filelock.Take(path)
		switch {
		case err == nil:
			return lock, nil
		case !errors.Is(err, filelock.ErrHeld):
			return nil, fmt.Errorf("runtime_dir: %w", err)
		case !time.Now().Before(end):
			return nil, fmt.Errorf("runtime_dir: another instance holds %s; stop it, or give this one a runtime_dir of its own", path)
		}
	}
}
