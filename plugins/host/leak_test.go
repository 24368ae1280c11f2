// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"runtime"
	"testing"
	"time"
)

// TestHostCrashMemory: what is in use is the same after many crashes.
func TestHostCrashMemory(t *testing.T) {
	h, _, logs := start(t, func(o *Options) { o.BackoffMin, o.BackoffMax = time.Millisecond, time.Millisecond })
	spec := as(t, "exits")
	spec.StartTimeout = 10 * time.Second
	if err := h.Apply(ctx, []PluginSpec{spec}, []FarmSpec{farmSpec("s1", PolicyUse{Plugin: "p"})}); err != nil {
		t.Fatal(err)
	}
	inUse := func() int64 {
		logs.mu.Lock()
		logs.b = bytes.Buffer{} // it would keep its capacity
		logs.mu.Unlock()
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	crashes := func(n uint64) { eventually(t, "crashes", func() bool { return h.Status()[0].Restarts >= n }) }
	crashes(50)
	before := inUse()
	crashes(300)
	after := inUse()
	t.Logf("%d KiB after 50 crashes, %d after 300", before>>10, after>>10)
	if after > before+1<<20 {
		t.Errorf("%d KiB in use after 50 crashes, %d after 300", before>>10, after>>10)
	}
}
