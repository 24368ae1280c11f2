// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bufio"
	"bytes"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httputil"
	"os"
	"strings"
	"testing"

	"github.com/weirgate/weir/internal/corpora"
)

// addSeeds adds the tables and, where it is there, the llhttp corpus.
func addSeeds(f *testing.F, kind string, add func([]byte)) {
	add(browserHead)
	add(picoHead)
	add(serverHead)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		add(append(drawHead(rng), drawChunked(rng)...))
	}
	if dir := os.Getenv("WEIR_CORPORA"); dir != "" {
		for _, c := range corpora.LLHTTP(f, true) {
			if strings.HasPrefix(c.Type, kind) {
				add(c.Raw)
			}
		}
	}
}

// peer is what net/http makes of the same bytes.
type peer struct {
	br *bufio.Reader
	n  *bytes.Reader
}

func newPeer(msg []byte) *peer {
	r := bytes.NewReader(msg)
	return &peer{br: bufio.NewReaderSize(r, 1<<17), n: r}
}

// consumed returns how many bytes of the message were taken.
func (p *peer) consumed(msg []byte) int { return len(msg) - p.n.Len() - p.br.Buffered() }

// tolerated are the errors with which net/http refuses what this package frames:
// it parses the target as a URL, forbids some names in Trailer, and bounds the
// overhead of chunks.
func tolerated(err error) bool {
	for _, s := range []string{"parse \"", "invalid URI", "invalid port", "bad trailer key", "too much non-data", "line too long",
		"header line too long", "malformed MIME header", "malformed chunked encoding: trailer", "suspiciously long trailer"} {
		if strings.Contains(err.Error(), s) {
			return true
		}
	}
	return false
}

func FuzzRequest(f *testing.F) {
	for _, c := range requestCases {
		if len(c.msg) < 2000 {
			f.Add([]byte(c.msg), uint64(0))
		}
	}
	addSeeds(f, "request", func(b []byte) { f.Add(b, uint64(1)) })
	f.Fuzz(func(t *testing.T, msg []byte, cuts uint64) {
		if len(msg) > 0 {
			fuzzRequest(t, msg, rand.New(rand.NewPCG(cuts, 0)))
		}
	})
}

// fuzzRequest scans one request in several cuts, compares it with the reference
// and with net/http, and returns where it ends if it does.
func fuzzRequest(t *testing.T, msg []byte, rng *rand.Rand) (end int, ended bool) {
	t.Helper()
	w, err := NewWanted(oddWanted...)
	if err != nil {
		t.Fatal(err)
	}
	h, st := scanRequestCuts(t, rng, msg, DefaultLimits(), w, 1)
	checkRequest(t, msg, h, st, oddWanted)
	if st != Done {
		return 0, false
	}
	_, n, st := scanBody(t, msg[h.Len:], h.Body, h.Length, DefaultLimits(), randomly(rng), rng)
	compareRequest(t, msg, &h, int(h.Len)+n, st)
	return int(h.Len) + n, st == Done
}

// compareRequest insists that net/http frames a request that is served the same.
func compareRequest(t *testing.T, msg []byte, h *RequestHead, end int, st Status) {
	t.Helper()
	lead := int(h.MethodSpan.Off) // net/http does not skip empty lines
	msg = msg[lead:]
	p := newPeer(msg)
	req, err := http.ReadRequest(p.br)
	if err != nil {
		if tolerated(err) {
			return
		}
		t.Fatalf("%.500q: %v, net/http refuses it: %v", msg, h.Outcome, err)
	}
	host := string(h.Host.Of(append(make([]byte, lead), msg...)))
	length := int64(h.Length)
	if h.Body == BodyChunked {
		length = -1
	}
	if req.Method != string(msg[:h.MethodSpan.Len]) || req.ProtoMinor != int(h.Minor) || req.Host != host || req.ContentLength != length ||
		len(req.TransferEncoding) != int(h.Body/BodyChunked) || req.Close == h.Persistent() {
		t.Fatalf("%.500q: net/http has %q minor %d host %q length %d %q close %v, the scanner %+v", msg, req.Method, req.ProtoMinor, req.Host,
			req.ContentLength, req.TransferEncoding, req.Close, h.bare())
	}
	if uri := string(h.Target.Of(append(make([]byte, lead), msg...))); req.RequestURI != uri {
		t.Fatalf("%.500q: net/http has target %q, the scanner %q", msg, req.RequestURI, uri)
	}
	compareBody(t, msg, p, req.Body, end-lead, st)
}

// compareBody reads the body with net/http, and compares where it ends.
func compareBody(t *testing.T, msg []byte, p *peer, body io.Reader, end int, st Status) {
	t.Helper()
	_, err := io.Copy(io.Discard, body)
	switch st {
	case Done:
		if err != nil {
			if tolerated(err) {
				return
			}
			t.Fatalf("%.500q: the body ends at %d, net/http refuses it: %v", msg, end, err)
		}
		if got := p.consumed(msg); got != end {
			t.Fatalf("%.500q: the message ends at %d, for net/http at %d", msg, end, got)
		}
	case More:
		if err == nil {
			t.Fatalf("%.500q: the body does not end, for net/http it does at %d", msg, p.consumed(msg))
		}
	case Bad:
		// Stricter is right.
	}
}

func FuzzResponse(f *testing.F) {
	for _, c := range responseCases {
		if len(c.msg) < 2000 {
			f.Add([]byte(c.msg), uint64(c.req)<<32)
		}
	}
	addSeeds(f, "response", func(b []byte) { f.Add(b, uint64(GET)<<32) })
	f.Fuzz(func(t *testing.T, msg []byte, cuts uint64) {
		fuzzResponse(t, msg, Method(cuts>>32)%(CONNECT+1), rand.New(rand.NewPCG(cuts, 0)))
	})
}

// fuzzResponse does with a response what fuzzRequest does with a request.
func fuzzResponse(t *testing.T, msg []byte, req Method, rng *rand.Rand) (end int, ended bool) {
	t.Helper()
	h, st := scanResponseCuts(t, rng, msg, DefaultLimits(), req, 1)
	checkResponse(t, msg, h, st, req)
	if st != Done || h.Body == BodyUntilClose || req == CONNECT {
		return 0, false
	}
	_, n, st := scanBody(t, msg[h.Len:], h.Body, h.Length, DefaultLimits(), randomly(rng), rng)
	compareResponse(t, msg, &h, req, int(h.Len)+n, st)
	return int(h.Len) + n, st == Done
}

// compareResponse insists that net/http frames a response the same, unless it is
// delivered until the server closes.
func compareResponse(t *testing.T, msg []byte, h *ResponseHead, method Method, end int, st Status) {
	t.Helper()
	p := newPeer(msg)
	name := method.String()
	if method == Other {
		name = "PROPFIND"
	}
	resp, err := http.ReadResponse(p.br, &http.Request{Method: name})
	if err != nil {
		if tolerated(err) {
			return
		}
		t.Fatalf("%.500q: %v, net/http refuses it: %v", msg, h.Outcome, err)
	}
	if resp.StatusCode != int(h.Status) || resp.ProtoMinor != int(h.Minor) ||
		h.Body == BodyLength && resp.ContentLength != int64(h.Length) || h.Body == BodyChunked && resp.ContentLength != -1 {
		t.Fatalf("%.500q: net/http has %d minor %d length %d, the scanner %+v", msg, resp.StatusCode, resp.ProtoMinor, resp.ContentLength, h.bare())
	}
	if h.Outcome == Accept && h.Status >= 200 && resp.Close {
		t.Fatalf("%.500q: accepted, though net/http would close", msg)
	}
	compareBody(t, msg, p, resp.Body, end, st)
}

func FuzzBody(f *testing.F) {
	for _, c := range chunkedCases {
		if len(c.body) < 2000 {
			f.Add([]byte(c.body), uint64(0))
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		f.Add(drawChunked(rng), uint64(0))
	}
	f.Fuzz(func(t *testing.T, msg []byte, cuts uint64) {
		fuzzChunked(t, msg, rand.New(rand.NewPCG(cuts, 0)))
	})
}

// fuzzChunked does with a chunked body what fuzzRequest does with a request.
func fuzzChunked(t *testing.T, msg []byte, rng *rand.Rand) {
	t.Helper()
	_, n, st := scanBodyCuts(t, rng, msg, BodyChunked, 0, DefaultLimits(), 2)
	checkChunked(t, msg, n, st)
	if st != Done {
		return
	}
	// The data are those that net/http decodes, and it stops at the trailers.
	lim := DefaultLimits()
	var b Body
	b.Start(BodyChunked, 0)
	var data []byte
	last := 0
	for at := 0; at < n; {
		k, framing, _ := b.Next(msg[at:n], &lim)
		if framing {
			last = at
		} else {
			data = append(data, msg[at:at+k]...)
		}
		at += k
	}
	// The last framing run holds the end of the last data, the last chunk
	// line and the trailers.
	tail := last
	if len(data) > 0 {
		tail += 2
	}
	tail += bytes.Index(msg[tail:], []byte("\r\n")) + 2
	p := newPeer(msg)
	got, err := io.ReadAll(httputil.NewChunkedReader(p.br))
	if err != nil {
		if tolerated(err) {
			return
		}
		t.Fatalf("%.500q: net/http refuses it: %v", msg, err)
	}
	if !bytes.Equal(got, data) || p.consumed(msg) != tail {
		t.Fatalf("%.500q: net/http reads %q up to %d, the scanner %q up to %d", msg, got, p.consumed(msg), data, tail)
	}
}
