// SPDX-License-Identifier: Apache-2.0

package module

import (
	"os"
	"runtime"
)

// spareProcessors are those of Go's scheduler beside the ones that the queues'
// threads hold: one for whatever else runs, and one that is idle meanwhile.
const spareProcessors = 2

// processors has Go's scheduler have enough processors (GOMAXPROCS) for so many
// threads that are in system calls nearly all of their time. A thread keeps its
// processor in a system call only as long as some other one is idle. Where none
// is, as on a host with two, the scheduler's monitor wakes every 20 microseconds
// to take them away, and a thread whose packets have come has to ask for one
// again: with one connection for each request that was a fifth of the program's
// time. It is never fewer than before, and not touched where the operator has
// set it in the environment.
func processors(threads int) {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	if n := threads + spareProcessors; runtime.GOMAXPROCS(0) < n {
		runtime.GOMAXPROCS(n)
	}
}
