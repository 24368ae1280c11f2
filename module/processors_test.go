// SPDX-License-Identifier: Apache-2.0

package module

import (
	"runtime"
	"testing"
)

// TestProcessors: there is an idle processor beside those of the threads, there
// are never fewer than before, and what the operator says counts.
func TestProcessors(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	t.Setenv("GOMAXPROCS", "2")
	processors(3)
	if n := runtime.GOMAXPROCS(0); n != 2 {
		t.Errorf("the environment says 2, there are %d", n)
	}
	t.Setenv("GOMAXPROCS", "")
	processors(3)
	if n := runtime.GOMAXPROCS(0); n < 4 {
		t.Errorf("three threads have %d processors", n)
	}
	runtime.GOMAXPROCS(16)
	processors(3)
	if n := runtime.GOMAXPROCS(0); n != 16 {
		t.Errorf("of 16 processors %d are left", n)
	}
}
