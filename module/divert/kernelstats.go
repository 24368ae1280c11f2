// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
)

// procPath lists the queues of the calling thread's network namespace.
const procPath = "/proc/thread-self/net/netfilter/nfnetlink_queue"

// KernelStats is what the kernel tells about one queue. The drop counters have
// 32 bits in the kernel, start at 0 with each bind and wrap.
type KernelStats struct {
	Queue            uint16
	PortID           uint32 // netlink port of the owner, mostly its process id
	Waiting          uint64 // packets that wait for a verdict now
	CopyMode         uint8  // 2: packets are copied
	CopyRange        uint32 // bytes of a packet that are copied at most
	DroppedQueueFull uint64 // packets dropped because Length of them waited
	DroppedUser      uint64 // packets dropped because the receive buffer was full
	LastID           uint64 // packets queued so far, dropped ones for the buffer included
}

// ReadKernelStats returns the counters of the given queues, or of all if none
// is given, in the network namespace of the calling thread. Queues that nobody
// has bound are left out. The error matches ErrUnsupported where the kernel has
// no queues.
func ReadKernelStats(queues ...uint16) ([]KernelStats, error) {
	b, err := os.ReadFile(procPath)
	if err != nil {
		return nil, procError(err)
	}
	return parseKernelStats(b, queues)
}

// procError explains an error of the counters' file.
func procError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("divert: kernel counters of queues: %w (%w)", ErrUnsupported, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("divert: kernel counters of queues: %w (%w)", ErrPermission, err)
	}
	return fmt.Errorf("divert: kernel counters of queues: %w", err)
}

// parseKernelStats reads the file's lines: queue number, port, waiting, copy
// mode, copy range, dropped for length, dropped for buffer, last id, 1.
func parseKernelStats(b []byte, queues []uint16) ([]KernelStats, error) {
	var all []KernelStats
	for line := range bytes.Lines(b) {
		fields := bytes.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 8 {
			return nil, fmt.Errorf("divert: %s: a line has %d fields instead of 9: %q", procPath, len(fields), line)
		}
		var v [8]uint64
		for i := range v {
			n, err := strconv.ParseUint(string(fields[i]), 10, 32)
			if err != nil {
				return nil, fmt.Errorf("divert: %s: field %d of %q: %w", procPath, i+1, line, err)
			}
			v[i] = n
		}
		k := KernelStats{
			Queue: uint16(v[0]), PortID: uint32(v[1]), Waiting: v[2], CopyMode: uint8(v[3]),
			CopyRange: uint32(v[4]), DroppedQueueFull: v[5], DroppedUser: v[6], LastID: v[7],
		}
		if len(queues) == 0 || slices.Contains(queues, k.Queue) {
			all = append(all, k)
		}
	}
	return all, nil
}

// counters keeps the counters' file of one namespace open, so that any
// goroutine can read it later. The file names the namespace in which it was
// opened, whichever thread reads it.
type counters struct {
	queue uint16
	file  *os.File
	err   error // why there is no file
}

func openCounters(queue uint16) counters {
	f, err := os.Open(procPath)
	return counters{queue: queue, file: f, err: err}
}

// read returns the queue's counters. It allocates and is for scrapes only.
func (c *counters) read() (KernelStats, error) {
	if c.err != nil {
		return KernelStats{}, procError(c.err)
	}
	// The kernel writes the file anew for each read from its beginning.
	b, err := io.ReadAll(io.NewSectionReader(c.file, 0, 1<<20))
	if err != nil {
		return KernelStats{}, procError(err)
	}
	all, err := parseKernelStats(b, []uint16{c.queue})
	if err != nil {
		return KernelStats{}, err
	}
	if len(all) == 0 {
		return KernelStats{}, ErrClosed
	}
	return all[0], nil
}

func (c *counters) close() {
	if c.file != nil {
		_ = c.file.Close()
	}
}
