// SPDX-License-Identifier: Apache-2.0

package flowstore

import "golang.org/x/sys/unix"

// HostTime is nanoseconds since the host's start, the same for all processes,
// or 0 where the kernel does not say.
func HostTime() int64 {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) != nil {
		return 0
	}
	return t.Nano()
}
