// SPDX-License-Identifier: Apache-2.0

// Package trial is what the integration tests have in common apart from the lab
// and the executables: how long they wait, how large they are, by which seed
// they draw, and that their lab goes away with them. It must know nothing of
// Weir.
package trial

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/weirgate/weir/integration/lab"
)

// Soak says whether the tests run in their full sizes.
var Soak = os.Getenv("WEIR_SOAK") != ""

// Size is how many of something a test does: in continuous integration, and in a
// soak.
func Size(ci, full int) int {
	if Soak {
		return full
	}
	return ci
}

// Seed is what a test draws by, written down. WEIR_SEED replays.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("WEIR_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("WEIR_SEED=%d", seed)
	return seed
}

// Within is a context that ends with the test, or after d.
func Within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// Until waits for a condition, which must come within d.
func Until(t testing.TB, d time.Duration, what string, cond func() bool) {
	t.Helper()
	ctx := Within(t, d)
	for !cond() {
		select {
		case <-ctx.Done():
			t.Fatalf("still waiting for: %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Lab makes a lab of that name, which is closed when the test is over.
func Lab(t testing.TB, name string) *lab.Lab {
	t.Helper()
	l, err := lab.New(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	return l
}
