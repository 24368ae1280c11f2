// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"math"
	"strings"
	"testing"
)

// chunkedCases holds bodies; end is what of them belongs to the message.
var chunkedCases = []struct {
	name string
	body string
	st   Status
	why  Reason
	end  int // -1: all
}{
	{"empty", "0\r\n\r\n", Done, 0, -1},
	{"one chunk", "5\r\nhello\r\n0\r\n\r\n", Done, 0, -1},
	{"more follows", "5\r\nhello\r\n0\r\n\r\nGET", Done, 0, 15},
	{"data looks like framing", "7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", Done, 0, -1},
	{"upper and lower case", "aA\r\n" + strings.Repeat("x", 170) + "\r\n0\r\n\r\n", Done, 0, -1},
	{"zeros", "0000000000000001\r\na\r\n000\r\n\r\n", Done, 0, -1},
	{"seventeen digits", "00000000000000001\r\na\r\n0\r\n\r\n", Bad, ReasonChunkTooLarge, 16},
	{"largest", "3fffffffffffffff\r\n", More, 0, -1},
	{"too large", "4000000000000000\r\n", Bad, ReasonChunkTooLarge, 15},
	{"wraps", "10000000000000000\r\n", Bad, ReasonChunkTooLarge, 16},
	{"no size", "\r\n", Bad, ReasonBadChunkSize, 0},
	{"sign", "+5\r\nhello\r\n", Bad, ReasonBadChunkSize, 0},
	{"0x", "0x5\r\nhello\r\n", Bad, ReasonBadChunkSize, 1},
	{"underscore", "1_0\r\n", Bad, ReasonBadChunkSize, 1},
	{"leading space", " 5\r\nhello\r\n", Bad, ReasonBadChunkSize, 0},
	{"space after size", "5 \r\nhello\r\n", Bad, ReasonBadChunkSize, 1},
	{"space before extension", "5 ;a\r\nhello\r\n", Bad, ReasonBadChunkSize, 1},
	{"LF after size", "5\nhello\r\n", Bad, ReasonBadChunkLineEnd, 1},
	{"CR after size", "5\rhello\r\n", Bad, ReasonBadChunkLineEnd, 2},
	{"CR CR LF", "5\r\r\nhello\r\n", Bad, ReasonBadChunkLineEnd, 2},
	{"LF in extension", "5;a\nhello\r\n", Bad, ReasonBadChunkLineEnd, 3},
	{"LF in quoted extension", "5;a=\"b\nc\"\r\nhello\r\n", Bad, ReasonBadChunkLineEnd, 6},
	{"CR in quoted extension", "5;a=\"b\rc\"\r\nhello\r\n", Bad, ReasonBadChunkExtension, 6},
	{"extensions", "5;a;b=c;d=\"e\\\"; f\xff\";g\r\nhello\r\n0;h\r\n\r\n", Done, 0, -1},
	{"empty extension", "5;\r\nhello\r\n", Bad, ReasonBadChunkExtension, 2},
	{"empty extension value", "5;a=\r\nhello\r\n", Bad, ReasonBadChunkExtension, 4},
	{"junk after quotes", "5;a=\"b\"c\r\nhello\r\n", Bad, ReasonBadChunkExtension, 7},
	{"space in extension", "5; a\r\nhello\r\n", Bad, ReasonBadChunkExtension, 2},
	{"NUL in extension", "5;a\x00\r\nhello\r\n", Bad, ReasonBadChunkExtension, 3},
	{"longest extension", "0;" + strings.Repeat("a", 4095) + "\r\n\r\n", Done, 0, -1},
	{"too long extension", "0;" + strings.Repeat("a", 4096) + "\r\n\r\n", Bad, ReasonChunkExtensionTooLong, 4097},
	{"data too long", "5\r\nhello!\r\n", Bad, ReasonBadChunkDataEnd, 8},
	{"data too short", "5\r\nhell\r\n0\r\n\r\n", Bad, ReasonBadChunkDataEnd, 8},
	{"LF after data", "5\r\nhello\n0\r\n\r\n", Bad, ReasonBadChunkDataEnd, 8},
	{"CR after data", "5\r\nhello\r0\r\n\r\n", Bad, ReasonBadChunkDataEnd, 9},
	{"trailers", "0\r\nA: b\r\nC:\r\n\r\n", Done, 0, -1},
	{"trailer of framing", "0\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\nhello", Done, 0, 46},
	{"trailer without colon", "0\r\nGET / HTTP/1.1\r\n\r\n", Bad, ReasonBadTrailer, 6},
	{"trailer with space before colon", "0\r\nA : b\r\n\r\n", Bad, ReasonBadTrailer, 4},
	{"trailer fold", "0\r\nA: b\r\n c\r\n\r\n", Bad, ReasonBadTrailer, 9},
	{"trailer LF", "0\r\nA: b\n\r\n", Bad, ReasonBareLF, 7},
	{"trailer CR", "0\r\nA: b\rc\r\n\r\n", Bad, ReasonBareCR, 8},
	{"trailer NUL", "0\r\nA: \x00\r\n\r\n", Bad, ReasonBadTrailer, 6},
	{"end LF", "0\r\n\n", Bad, ReasonBareLF, 3},
	{"end CR", "0\r\n\rX", Bad, ReasonBareCR, 4},
	{"end without empty line", "0\r\nX", More, 0, -1},
	{"largest trailers", "0\r\nA:" + strings.Repeat("b", 8188) + "\r\n\r\n", Done, 0, -1},
	{"too large trailers", "0\r\nA:" + strings.Repeat("b", 8189) + "\r\n\r\n", Bad, ReasonTrailersTooLarge, 3 + 8192},
	{"many trailers", "0\r\n" + strings.Repeat("A:b\r\n", 1639) + "\r\n", Bad, ReasonTrailersTooLarge, 3 + 8192},
}

func TestChunked(t *testing.T) {
	rng := seed(t)
	for _, c := range chunkedCases {
		t.Run(c.name, func(t *testing.T) {
			b, n, st := scanBodyCuts(t, rng, []byte(c.body), BodyChunked, 0, DefaultLimits(), 50)
			end := c.end
			if end < 0 {
				end = len(c.body)
			}
			if st != c.st || b.Reason() != c.why || n != end {
				t.Errorf("%.300q: %v %v at %d, want %v %v at %d", c.body, st, b.Reason(), n, c.st, c.why, end)
			}
			checkChunked(t, []byte(c.body), n, st)
		})
	}
}

func checkChunked(t testing.TB, msg []byte, n int, st Status) {
	t.Helper()
	ref, rst := referenceChunked(msg, DefaultLimits())
	switch {
	case rst == Done && (st != Done || n != ref),
		rst == Bad && (st != Bad || n > ref),
		rst == More && st == Done:
		t.Fatalf("%.300q: %v at %d, the reference says %v at %d", msg, st, n, rst, ref)
	}
}

func TestCountedBody(t *testing.T) {
	rng := seed(t)
	for length := range uint64(20) {
		for have := range 25 {
			msg := []byte(strings.Repeat("\r\n0", 9)[:have])
			b, n, st := scanBodyCuts(t, rng, msg, BodyLength, length, DefaultLimits(), 20)
			want, wst := min(have, int(length)), More
			if uint64(have) >= length {
				wst = Done
			}
			if n != want || st != wst || b.Known() != length-uint64(want) {
				t.Fatalf("%d of %d bytes: %v after %d, %d known", have, length, st, n, b.Known())
			}
		}
	}
}

func TestOtherBodies(t *testing.T) {
	lim := DefaultLimits()
	var b Body
	if n, st := b.Feed([]byte("x"), &lim); n != 0 || st != Done {
		t.Errorf("zero value: %d %v", n, st)
	}
	b.Start(BodyNone, 7)
	if n, st := b.Feed([]byte("x"), &lim); n != 0 || st != Done || !b.Complete() || b.Known() != 0 {
		t.Errorf("none: %d %v", n, st)
	}
	if b.Start(BodyLength, 0); !b.Complete() {
		t.Error("a body of no bytes is not complete from the start")
	}
	b.Start(BodyUntilClose, 0)
	if n, st := b.Feed(make([]byte, 1000), &lim); n != 1000 || st != More || b.Complete() || b.Known() != math.MaxUint64 {
		t.Errorf("until close: %d %v", n, st)
	}
	b.Skip(1 << 40)
	if b.Passed() != 1<<40+1000 || b.Reason() != 0 {
		t.Errorf("until close: passed %d", b.Passed())
	}
}

// Skipping what is not known loses the framing, visibly.
func TestSkipTooFar(t *testing.T) {
	lim := DefaultLimits()
	for _, feed := range []string{"", "5", "5\r", "5\r\n", "5\r\nhello", "5\r\nhello\r\n0\r\n", "5\r\nhello\r\n0\r\n\r\n"} {
		var b Body
		b.Start(BodyChunked, 0)
		b.Feed([]byte(feed), &lim)
		b.Skip(0)
		if b.Reason() != ReasonNone {
			t.Errorf("%.300q: skipping nothing is %v", feed, b.Reason())
		}
		b.Skip(b.Known() + 1)
		if n, st := b.Feed([]byte("x"), &lim); n != 0 || st != Bad || b.Reason() != ReasonOverrun || b.Known() != 0 {
			t.Errorf("%.300q: %d %v %v", feed, n, st, b.Reason())
		}
	}
}

// Next separates framing from data.
func TestNext(t *testing.T) {
	lim := DefaultLimits()
	msg := []byte("5;x\r\nhello\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\nrest")
	var framing, data strings.Builder
	var b Body
	b.Start(BodyChunked, 0)
	p := msg
	for {
		n, f, st := b.Next(p, &lim)
		if f {
			framing.Write(p[:n])
		} else {
			data.Write(p[:n])
		}
		p = p[n:]
		if st != More {
			break
		}
	}
	if data.String() != "helloabc" || framing.String() != "5;x\r\n\r\n3\r\n\r\n0\r\nA: b\r\n\r\n" || string(p) != "rest" {
		t.Errorf("data %q framing %q rest %q", data.String(), framing.String(), p)
	}
}
