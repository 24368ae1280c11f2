// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// The targets of this file are structure-aware: what the fuzzer changes is not
// a message but the choices out of which one is drawn, so that each change
// moves, repeats, drops or respells something whole: a line, a field, a chunk,
// a line end. The drawn bytes go through the same comparisons as raw ones.

// tape is a random source that plays a fuzzer's bytes, one for each choice, and
// goes on with a fixed sequence behind them.
type tape struct {
	b    []byte
	then *rand.PCG
}

// choices makes a random source out of a fuzzer's bytes.
func choices(b []byte) *rand.Rand { return rand.New(&tape{b: b, then: rand.NewPCG(1, uint64(len(b)))}) }

// Uint64 implements rand.Source. The byte fills the number, because the draws
// look at its upper bits or its lower ones.
func (s *tape) Uint64() uint64 {
	if len(s.b) == 0 {
		return s.then.Uint64()
	}
	c := s.b[0]
	s.b = s.b[1:]
	return uint64(c) * swarOnes
}

// drawSound draws a message with a correct frame, among fields that do not
// matter.
func drawSound(rng *rand.Rand, response bool) []byte {
	var b bytes.Buffer
	line := []string{"POST / HTTP/1.1", "GET /a?b HTTP/1.1", "PUT http://x/ HTTP/1.1", "OPTIONS * HTTP/1.1", "FOO /%2e HTTP/1.1", "POST / HTTP/1.0"}
	if response {
		line = []string{"HTTP/1.1 200 OK", "HTTP/1.1 404 ", "HTTP/1.1 500", "HTTP/1.1 103 x", "HTTP/1.0 200 OK", "HTTP/1.1 304 x"}
	}
	b.WriteString(pick(rng, line) + "\r\n")
	fields := func() {
		for rng.IntN(3) == 0 {
			b.WriteString(pick(rng, []string{"A: b", "Cookie: a=b; c=d", "X:", "X:\t y ", "Forwarded: for=x", "Connection: keep-alive", "connection: Close", "Authorization: Basic x"}) + "\r\n")
		}
	}
	fields()
	if !response {
		b.WriteString(pick(rng, []string{"Host: x", "host:x", "HOST:\tX "}) + "\r\n")
		fields()
	}
	body := []byte(nil)
	switch rng.IntN(4) {
	case 0:
		b.WriteString(pick(rng, []string{"Content-Length: 5", "content-length:05 ", "Content-Length:\t5"}) + "\r\n")
		body = []byte("\r\nGET")
	case 1:
		b.WriteString(pick(rng, []string{"Transfer-Encoding: chunked", "transfer-encoding:CHUNKED\t"}) + "\r\n")
		body = drawChunked(rng)
	case 2:
		b.WriteString("Content-Length: 0\r\n")
	}
	fields()
	b.WriteString("\r\n")
	return append(b.Bytes(), body...)
}

// drawStream draws up to four messages that follow each other. Some are sound,
// some are spoilt a little, some are made of oddities.
func drawStream(rng *rand.Rand, response bool) []byte {
	var b []byte
	for range 1 + rng.IntN(4) {
		var m []byte
		switch rng.IntN(5) {
		case 0:
			m = append(drawHead(rng), drawChunked(rng)...)
		case 1, 2:
			m = mutate(rng, drawSound(rng, response))
		default:
			m = drawSound(rng, response)
		}
		b = append(b, m...)
	}
	return b
}

// seedTapes adds tapes of several lengths.
func seedTapes(f *testing.F) {
	rng := rand.New(rand.NewPCG(3, 4))
	for n := range 40 {
		b := make([]byte, 2*n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		f.Add(b, uint64(n)<<32)
	}
}

func FuzzRequestDrawn(f *testing.F) {
	seedTapes(f)
	f.Fuzz(func(t *testing.T, play []byte, cuts uint64) {
		rng := rand.New(rand.NewPCG(cuts, 0))
		for msg := drawStream(choices(play), false); len(msg) > 0; {
			n, ended := fuzzRequest(t, msg, rng)
			if !ended {
				break
			}
			msg = msg[n:]
		}
	})
}

func FuzzResponseDrawn(f *testing.F) {
	seedTapes(f)
	f.Fuzz(func(t *testing.T, play []byte, cuts uint64) {
		rng := rand.New(rand.NewPCG(cuts, 0))
		for msg := drawStream(choices(play), true); len(msg) > 0; {
			n, ended := fuzzResponse(t, msg, Method(cuts>>32)%(CONNECT+1), rng)
			if !ended {
				break
			}
			msg = msg[n:]
		}
	})
}

func FuzzBodyDrawn(f *testing.F) {
	seedTapes(f)
	f.Fuzz(func(t *testing.T, play []byte, cuts uint64) {
		rng := choices(play)
		msg := mutate(rng, drawChunked(rng))
		fuzzChunked(t, append(msg, drawChunked(rng)...), rand.New(rand.NewPCG(cuts, 0)))
	})
}

// TestDrawnStreams is the control of the drawn targets: enough of what is drawn
// is accepted, and followed by another message, to compare where it ends.
func TestDrawnStreams(t *testing.T) {
	rng := seed(t)
	ended, followed, streams := 0, 0, 400
	for range streams {
		play := make([]byte, 60)
		for i := range play {
			play[i] = byte(rng.Uint32())
		}
		msg := drawStream(choices(play), false)
		for k := 0; len(msg) > 0; k++ {
			n, ok := fuzzRequest(t, msg, rng)
			if !ok {
				break
			}
			ended++
			if k > 0 {
				followed++
			}
			msg = msg[n:]
		}
	}
	t.Logf("%d streams: %d messages ended, %d of them behind another one", streams, ended, followed)
	if ended < streams/2 || followed < streams/10 {
		t.Error("hardly anything that is drawn is a message")
	}
}
