// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"encoding/hex"
	"fmt"
	"sync"
	"testing"
)

// A ledger is what both ends of the canary rig wrote down, for the checker to
// read afterwards. It knows nothing of Weir.
type ledger struct {
	mu       sync.Mutex
	executed map[string]int // by nonce: how often a server application ran it
	streams  []stream
}

// A stream is one client connection: what it asked, what it received, byte for
// byte, and how each of its exchanges ended as far as it could tell.
type stream struct {
	asked    []string // nonces, in order
	complete []bool   // the answer came whole and was right
	post     []bool   // the request was not idempotent
	received []byte
}

func newLedger() *ledger { return &ledger{executed: map[string]int{}} }

func (l *ledger) ran(nonce string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.executed[nonce]++
}

func (l *ledger) add(s stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams = append(l.streams, s)
}

// nonceText finds the nonces in a stream: 32 hexadecimal digits, one after the
// other.
func nonceText(b []byte) (all []string) {
	run := 0
	for i, c := range b {
		if c >= '0' && c <= '9' || c >= 'a' && c <= 'f' {
			run++
		} else {
			run = 0
		}
		if run == 32 {
			all = append(all, string(b[i-31:i+1]))
			run = 0
		}
	}
	return all
}

// check proves INV-2 and INV-4 from both sides' logs. twice is how many
// repetitions of idempotent requests Weir has counted.
func (l *ledger) check(twice int) (problems []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	owner := map[string]int{}
	idempotent := map[string]bool{}
	for i, s := range l.streams {
		for j, n := range s.asked {
			owner[n] = i
			idempotent[n] = !s.post[j]
		}
	}
	bad := func(format string, a ...any) { problems = append(problems, fmt.Sprintf(format, a...)) }
	for i, s := range l.streams {
		// INV-2: every nonce in the stream was asked on this very connection,
		// and in the order in which it was asked.
		at := -1
		for _, n := range nonceText(s.received) {
			o, known := owner[n]
			switch {
			case !known:
				bad("stream %d holds the nonce %s, which nobody has", i, n)
				continue
			case o != i:
				bad("stream %d holds the nonce %s of stream %d (INV-2)", i, n, o)
				continue
			}
			k := at
			for k = max(at, 0); k < len(s.asked) && s.asked[k] != n; k++ {
			}
			if k == len(s.asked) {
				bad("stream %d: an answer to an earlier request comes late: %s", i, n)
				continue
			}
			at = k
		}
		// INV-4: at most once; once if it was answered.
		for j, n := range s.asked {
			switch times := l.executed[n]; {
			case s.complete[j] && times == 0:
				bad("stream %d: request %s is answered, but no server ran it (INV-4)", i, n)
			case times > 1 && s.post[j]:
				bad("request %s ran %d times (INV-4)", n, times)
			}
		}
	}
	again := 0
	for n, times := range l.executed {
		if _, known := owner[n]; !known {
			bad("a server ran %q, which nobody asked", n)
		} else if idempotent[n] {
			again += times - 1
		}
	}
	if again > twice {
		bad("%d idempotent requests ran again, %d are counted (INV-4)", again, twice)
	}
	return problems
}

// TestLedger is the negative control of the checker: each thing that it is
// there to find.
func TestLedger(t *testing.T) {
	nonce := func(b byte) string { return hex.EncodeToString([]byte{b, 15: b}) }
	good := func() *ledger {
		l := newLedger()
		l.add(stream{[]string{nonce(1), nonce(2)}, []bool{true, false}, []bool{true, false}, []byte("x" + nonce(1) + "y" + nonce(1) + "z" + nonce(2))})
		l.add(stream{[]string{nonce(3)}, []bool{true}, []bool{false}, []byte(nonce(3))})
		l.executed = map[string]int{nonce(1): 1, nonce(2): 1, nonce(3): 1}
		return l
	}
	if p := good().check(0); p != nil {
		t.Errorf("an honest ledger: %q", p)
	}
	for what, spoil := range map[string]func(*ledger){
		"another's nonce":     func(l *ledger) { l.streams[1].received = append(l.streams[1].received, nonce(1)...) },
		"nobody's nonce":      func(l *ledger) { l.streams[1].received = append(l.streams[1].received, nonce(9)...) },
		"an answer late":      func(l *ledger) { l.streams[0].received = append(l.streams[0].received, nonce(1)...) },
		"a POST twice":        func(l *ledger) { l.executed[nonce(1)]++ },
		"a GET twice":         func(l *ledger) { l.executed[nonce(3)]++ },
		"answered, never ran": func(l *ledger) { delete(l.executed, nonce(1)) },
		"ran, never asked":    func(l *ledger) { l.executed[nonce(8)]++ },
	} {
		l := good()
		spoil(l)
		if l.check(0) == nil {
			t.Errorf("%s goes unseen", what)
		}
	}
	l := good()
	l.executed[nonce(3)]++
	if p := l.check(1); p != nil {
		t.Errorf("a counted repetition: %q", p)
	}
}
