// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"slices"
	"testing"

	"github.com/weirgate/weir/internal/corpora"
)

// stricter lists the cases that llhttp accepts and this package refuses.
var stricter = map[string]string{
	"request/method/77":             "CONNECT is answered with 501: there is no tunnel to open.",
	"request/method/78":             "CONNECT, as above.",
	"request/method/79":             "CONNECT, as above.",
	"request/uri/163":               "CONNECT, as above.",
	"request/method/80":             "The asterisk form belongs to OPTIONS (RFC 9112 section 3.2.4).",
	"request/method/87":             "ICE is not HTTP.",
	"request/method/88":             "RTSP is not HTTP.",
	"request/method/89":             "RTSP is not HTTP.",
	"request/sample/115":            "A request without version (HTTP/0.9) has no head to frame.",
	"request/transfer-encoding/143": "A transfer coding besides chunked is answered with 501: servers differ in which they know.",
	"request/transfer-encoding/144": "Two Transfer-Encoding fields, the first of an unknown coding.",
	"request/uri/164":               "User information in the authority (RFC 9110 section 4.2.4 lets it be treated as an error).",
	"response/connection/180":       "An empty line before a status line is bytes beyond the end of the first response; the first message agrees.",
	"response/connection/182":       "An empty line before a status line, as above.",
	"response/pipelining/220":       "An empty line before a status line, as above.",
	"response/sample/222":           "RTSP is not HTTP.",
	"response/sample/223":           "ICE is not HTTP.",
	"response/sample/238":           "HTTP/0.9 has no status line.",
	"response/sample/240":           "An empty line before a status line, as above.",
}

// laxer lists the cases that llhttp refuses and this package accepts.
var laxer = map[string]string{
	"request/invalid/45": "llhttp has a list of methods per protocol; RFC 9110 section 9.1 lets any token be one, and no length depends on it.",
	"request/invalid/55": "A method that is not in llhttp's list, as above.",
}

// headsOnly lists the cases whose test tells llhttp to skip the bodies, so that
// their messages end with their heads.
var headsOnly = map[string]bool{
	"request/content-length/36":   true,
	"response/content-length/186": true,
}

// isolated lists the valid requests that are served and never pooled.
var isolated = map[string]Reason{
	"request/connection/11":     ReasonConnectionOption,
	"request/connection/13":     ReasonUpgrade,
	"request/connection/17":     ReasonUpgrade,
	"request/connection/18":     ReasonUpgrade,
	"request/connection/19":     ReasonUpgrade,
	"request/connection/20":     ReasonUpgrade,
	"request/content-length/21": ReasonPaddedContentLength,
	"request/content-length/22": ReasonPaddedContentLength,
	"request/content-length/29": ReasonUnexpectedBody,
}

// scanMessages scans all requests or responses of a stream. It returns the ends
// of the messages, why the rest was refused, and why the first message that may
// not be pooled may not be.
func scanMessages(t testing.TB, msg []byte, request, bodies bool, cut cutter) (ends []int, bad, doubt Reason) {
	t.Helper()
	lim := DefaultLimits()
	at := 0
	for at < len(msg) {
		kind, length, n := BodyNone, uint64(0), 0
		if request {
			h, st := scanRequest(t, msg[at:], lim, nil, cut)
			if st != Done {
				return ends, h.Reason, doubt
			}
			n, kind, length = int(h.Len), h.Body, h.Length
			if doubt == ReasonNone {
				doubt = h.Reason
			}
		} else {
			h, st := scanResponse(t, msg[at:], lim, GET, cut)
			if st != Done {
				return ends, h.Reason, doubt
			}
			n, kind, length = int(h.Len), h.Body, h.Length
			if doubt == ReasonNone {
				doubt = h.Reason
			}
			if h.Status == 101 {
				return append(ends, at+n), ReasonNone, doubt
			}
		}
		k := 0
		if bodies {
			var b Body
			var st Status
			if b, k, st = scanBody(t, msg[at+n:], kind, length, lim, cut, nil); st != Done {
				return ends, b.Reason(), doubt
			}
		}
		at += n + k
		ends = append(ends, at)
	}
	return ends, ReasonNone, doubt
}

func TestLLHTTP(t *testing.T) {
	rng := seed(t)
	used := map[string]bool{}
	for _, c := range corpora.LLHTTP(t, false) {
		id := c.ID
		request, bodies := c.Request(), !headsOnly[id]
		t.Run(id, func(t *testing.T) {
			msg, want := c.Stream()
			got, bad, doubt := scanMessages(t, msg, request, bodies, whole)
			for i := range 51 {
				cut := cutter(bytewise)
				if i > 0 {
					cut = randomly(rng)
				}
				got2, bad2, doubt2 := scanMessages(t, msg, request, bodies, cut)
				if !slices.Equal(got, got2) || bad != bad2 || doubt != doubt2 {
					t.Fatalf("cutting changes the result: %v %v %v, %v %v %v", got, bad, doubt, got2, bad2, doubt2)
				}
			}
			for i := range got {
				if i < len(want) && got[i] != want[i] {
					t.Errorf("%q: message %d ends at %d, want %d", msg, i, got[i], want[i])
				}
			}
			if c.Valid() {
				missing := len(got) < len(want) || len(want) == 0 && bad != ReasonNone
				if why, ok := stricter[id]; ok {
					used[id] = true
					if !missing {
						t.Errorf("%q: is accepted, though listed as refused: %s", msg, why)
					}
				} else if missing {
					t.Errorf("%q: %d messages, want %d: %v", msg, len(got), len(want), bad)
				} else if request && doubt != isolated[id] {
					t.Errorf("%q: isolated for %v, listed for %v", msg, doubt, isolated[id])
				}
				return
			}
			// A response that is not valid is delivered, and never pooled.
			refused := bad != ReasonNone || !request && doubt != ReasonNone
			if why, ok := laxer[id]; ok {
				used[id] = true
				if refused {
					t.Errorf("%q: is refused, though listed as accepted: %s", msg, why)
				}
			} else if !refused {
				t.Errorf("%q: %s; accepted with ends %v", msg, *c.Error, got)
			}
		})
	}
	for _, m := range []map[string]string{stricter, laxer} {
		for id := range m {
			if !used[id] {
				t.Errorf("%s is listed and not in the corpus", id)
			}
		}
	}
}

// refusedCompliant lists what desync-guardian, which sees parsed requests, calls
// compliant and this package refuses.
var refusedCompliant = map[string]string{
	"Correct TE OK": "A coding besides chunked is answered with 501: servers differ in which they know.",
	"Transfer-Encoding: identity and chunked OK":                "As above; identity is no coding since RFC 7230.",
	"Multiple transfer encoding headers in a single request OK": "As above, in several fields.",
	"TE with custom parameters OK":                              "chunked has no parameters (RFC 9112 section 7.1).",
	"Different Transfer-Encoding headers":                       "As the first.",
	"Different Transfer-Encoding headers combined":              "As the first.",
	"Transfer-Encoding with a param: chunked;custom_param":      "chunked has no parameters (RFC 9112 section 7.1).",
	"International in URI":                                      "Octets from 0x80 in the target: RFC 3986 has none, and 0x85 is a line or word end to some servers.",
	"Empty URI":                                                 "Two spaces: a target is never empty (RFC 9112 section 3.2).",
}

func TestDesyncGuardian(t *testing.T) {
	rng := seed(t)
	used := map[string]bool{}
	for _, c := range corpora.DesyncGuardian(t) {
		for _, msg := range c.Messages() {
			h, st := scanRequestCuts(t, rng, msg, DefaultLimits(), nil, 50)
			if st == More {
				t.Errorf("%s: %q: not decided", c.Name, msg)
				continue
			}
			switch c.Expected.Tier {
			case "Severe":
				if h.Outcome != Reject {
					t.Errorf("%s: %q: severe, %v %v", c.Name, msg, h.Outcome, h.Reason)
				}
			case "Ambiguous":
				if h.Outcome == Accept {
					t.Errorf("%s: %q: ambiguous, %v", c.Name, msg, h.Outcome)
				}
			case "Compliant":
				if _, ok := refusedCompliant[c.Name]; ok {
					used[c.Name] = true
					if h.Outcome != Reject {
						t.Errorf("%s: %q: %v, though listed as refused", c.Name, msg, h.Outcome)
					}
				} else if h.Outcome != Accept {
					t.Errorf("%s: %q: compliant, %v %v", c.Name, msg, h.Outcome, h.Reason)
				}
			case "Acceptable":
				// Cut either way; the reference decides in checkRequest.
			default:
				t.Errorf("%s: unknown tier %q", c.Name, c.Expected.Tier)
			}
			checkRequest(t, msg, h, st, nil)
		}
	}
	for name := range refusedCompliant {
		if !used[name] {
			t.Errorf("%s is listed and not in the corpus", name)
		}
	}
}
