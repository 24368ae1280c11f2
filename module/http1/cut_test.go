// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// seed returns the seed of a random test, from WEIR_SEED or the clock, and says
// it.
func seed(t testing.TB) *rand.Rand {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("WEIR_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("WEIR_SEED: %v", err)
		}
		s = n
	}
	t.Logf("WEIR_SEED=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}

// A cutter says where the pieces of a message end: given the bytes that remain,
// the length of the next piece.
type cutter func(remain int) int

func whole(remain int) int { return remain }
func bytewise(int) int     { return 1 }

func randomly(rng *rand.Rand) cutter {
	return func(remain int) int {
		if remain == 0 || rng.IntN(8) == 0 {
			return 0
		}
		k := 1 + rng.IntN(1+rng.IntN(min(remain, 64)))
		return min(k, remain)
	}
}

// feed gives msg to scan in pieces. Each piece is in memory of its own that is
// spoiled as soon as the call returns: nothing may look at it again.
func feed(t testing.TB, msg []byte, cut cutter, scan func([]byte) (int, Status)) (n int, st Status) {
	t.Helper()
	for n < len(msg) || st == More && len(msg) == 0 {
		k := min(cut(len(msg)-n), len(msg)-n)
		p := make([]byte, k)
		copy(p, msg[n:])
		var got int
		got, st = scan(p)
		for i := range p {
			p[i] = '\r'
		}
		if got < 0 || got > k || st == More && got != k {
			t.Fatalf("%.300q: took %d of %d bytes with status %v", msg, got, k, st)
		}
		n += got
		if st != More || len(msg) == 0 {
			break
		}
	}
	// The status stays, and nothing more is taken.
	if st != More {
		if again, st2 := scan([]byte("GET / ")); again != 0 || st2 != st {
			t.Fatalf("%.300q: after %v a further call took %d bytes: %v", msg, st, again, st2)
		}
	}
	return n, st
}

// bare returns the results without the state of the machine.
func (h RequestHead) bare() RequestHead {
	h.fields = section{}
	h.auth = [maxAuthority]byte{}
	return h
}

func (h ResponseHead) bare() ResponseHead {
	h.fields = section{}
	return h
}

// scanRequest scans a request in pieces.
func scanRequest(t testing.TB, msg []byte, lim Limits, w *Wanted, cut cutter) (h RequestHead, st Status) {
	t.Helper()
	n, st := feed(t, msg, cut, func(p []byte) (int, Status) {
		if h.state < rqDone {
			return h.Scan(p, &lim, w)
		}
		c := h
		n, st := h.Scan(p, &lim, w)
		if c != h {
			t.Fatalf("%.300q: a call after the end changed the head", msg)
		}
		return n, st
	})
	if st != More && n != int(h.Len) {
		t.Fatalf("%.300q: took %d bytes, Len is %d", msg, n, h.Len)
	}
	if (st == Bad) != (h.Outcome == Reject) || st == Bad && h.Reason == ReasonNone {
		t.Fatalf("%.300q: %v with %v %v", msg, st, h.Outcome, h.Reason)
	}
	if st == Done && (h.Outcome == Accept) != (h.Reason == ReasonNone) {
		t.Fatalf("%.300q: %v with reason %v", msg, h.Outcome, h.Reason)
	}
	return h, st
}

// scanRequestCuts scans a request whole, byte after byte and with random cuts,
// and insists on one result.
func scanRequestCuts(t testing.TB, rng *rand.Rand, msg []byte, lim Limits, w *Wanted, cuts int) (RequestHead, Status) {
	t.Helper()
	h, st := scanRequest(t, msg, lim, w, whole)
	for i := range cuts + 1 {
		cut := cutter(bytewise)
		if i > 0 {
			cut = randomly(rng)
		}
		h2, st2 := scanRequest(t, msg, lim, w, cut)
		if st2 != st || st != More && h2.bare() != h.bare() {
			t.Fatalf("%.300q: cutting changes the result:\nwhole %v %v %+v\ncut %d %v %v %+v", msg, st, h.Reason, h.bare(), i, st2, h2.Reason, h2.bare())
		}
	}
	return h, st
}

// scanResponse scans a response head in pieces.
func scanResponse(t testing.TB, msg []byte, lim Limits, req Method, cut cutter) (h ResponseHead, st Status) {
	t.Helper()
	h.Reset(req)
	n, st := feed(t, msg, cut, func(p []byte) (int, Status) { return h.Scan(p, &lim) })
	if n != int(h.Len) {
		t.Fatalf("%.300q: took %d bytes, Len is %d", msg, n, h.Len)
	}
	if (st == Bad) != (h.Outcome == Reject) {
		t.Fatalf("%.300q: %v with %v %v", msg, st, h.Outcome, h.Reason)
	}
	if st == Done && (h.Outcome == Accept) != (h.Reason == ReasonNone) {
		t.Fatalf("%.300q: %v with reason %v", msg, h.Outcome, h.Reason)
	}
	if st == Done && h.Body == BodyUntilClose && h.Outcome != Isolate {
		t.Fatalf("%.300q: until close and %v", msg, h.Outcome)
	}
	return h, st
}

func scanResponseCuts(t testing.TB, rng *rand.Rand, msg []byte, lim Limits, req Method, cuts int) (ResponseHead, Status) {
	t.Helper()
	h, st := scanResponse(t, msg, lim, req, whole)
	for i := range cuts + 1 {
		cut := cutter(bytewise)
		if i > 0 {
			cut = randomly(rng)
		}
		h2, st2 := scanResponse(t, msg, lim, req, cut)
		if st2 != st || st != More && h2.bare() != h.bare() {
			t.Fatalf("%.300q: cutting changes the result:\nwhole %v %v %+v\ncut %d %v %v %+v", msg, st, h.Reason, h.bare(), i, st2, h2.Reason, h2.bare())
		}
	}
	return h, st
}

// scanBody passes a body in pieces; with skip it moves over known bytes without
// showing them, whenever chance says so.
func scanBody(t testing.TB, msg []byte, kind BodyKind, length uint64, lim Limits, cut cutter, skip *rand.Rand) (b Body, n int, st Status) {
	t.Helper()
	b.Start(kind, length)
	n, st = feed(t, msg, cut, func(p []byte) (int, Status) {
		passed := b.Passed()
		if skip != nil && uint64(len(p)) <= b.Known() && len(p) > 0 && skip.IntN(2) == 0 {
			b.Skip(uint64(len(p)))
			if b.Complete() {
				return len(p), Done
			}
			return len(p), More
		}
		known := b.Known()
		n, st := b.Feed(p, &lim)
		if b.Passed() != passed+uint64(n) {
			t.Fatalf("%.300q: passed %d bytes, says %d", msg, n, b.Passed()-passed)
		}
		if known != 0 && uint64(n) < min(known, uint64(len(p))) {
			t.Fatalf("%.300q: %d bytes were known, %d taken", msg, known, n)
		}
		return n, st
	})
	if (st == Bad) != (b.Reason() != ReasonNone) || (st == Done) != b.Complete() {
		t.Fatalf("%.300q: %v with reason %v, complete %v", msg, st, b.Reason(), b.Complete())
	}
	return b, n, st
}

func scanBodyCuts(t testing.TB, rng *rand.Rand, msg []byte, kind BodyKind, length uint64, lim Limits, cuts int) (Body, int, Status) {
	t.Helper()
	b, n, st := scanBody(t, msg, kind, length, lim, whole, nil)
	for i := range cuts + 1 {
		cut := cutter(bytewise)
		var skip *rand.Rand
		if i > 0 {
			cut = randomly(rng)
			if i&1 == 0 {
				skip = rng
			}
		}
		b2, n2, st2 := scanBody(t, msg, kind, length, lim, cut, skip)
		if b2 != b || n2 != n || st2 != st {
			t.Fatalf("%.300q: cutting changes the result:\nwhole %v at %d %+v\ncut %d %v at %d %+v", msg, st, n, b, i, st2, n2, b2)
		}
	}
	return b, n, st
}
