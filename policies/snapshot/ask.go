// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"slices"
)

// MaxAsks is how many policies of a farm may ask their plugins.
const MaxAsks = 4

// MaxQuestion is the size of the largest key, in bytes.
const MaxQuestion = 4096

// AskKey says what a plugin wants to know of a request. Nothing else is sent
// to it, and its answers are kept under exactly these.
type AskKey struct {
	Method   bool
	Host     bool
	Path     bool  // the raw path, without a query
	Segments uint8 // only the first so many segments of Path; 0: all
	Fields   []Field
	Client   bool
	Bits4    uint8 // leading bits of the client's address that count; 0: all
	Bits6    uint8
}

// Fallback is what happens to a request about which no answer came in time.
type Fallback uint8

// What a policy does without an answer.
const (
	FallbackIgnore Fallback = iota // go on as if the policy were not there
	FallbackReject                 // answer 503
)

// Key are the parts of a request that a plugin is asked about.
type Key struct {
	Method string
	Host   string
	Path   string
	Fields []KeyField   // in the order of AskKey.Fields
	Client netip.Prefix // not valid: it was not asked for
}

// KeyField is one field of a request.
type KeyField struct {
	Field   Field
	Value   string
	Present bool
}

// Answer is what a plugin says about a request, as one of Servers, Reject and
// Redirect; with none of them it has no opinion.
type Answer struct {
	Servers    []Score // the servers that may be used; a score of 0 is as good as 1
	Reject     uint16  // a status, 400 to 599
	RetryAfter uint32  // seconds, with Reject; 0: no such field
	Redirect   uint16  // 302, 307 or 308
	Location   string  // with Redirect
	Mark       uint32  // for the connection; 0: none
	Ban        uint32  // seconds to keep the client away; 0: not at all
}

// CompiledAnswer is an Answer in the numbers of a Selector. It never changes.
type CompiledAnswer struct {
	kind     ChoiceKind // ChoiceServer without set: no opinion
	failed   bool       // there is no answer
	status   uint16
	retry    uint32
	location string
	mark     uint32
	ban      uint32
	set      []uint64  // nil: no opinion about servers
	scores   []float64 // by server; nil: none
	maxScore float64
	text     string // for people
}

// Unanswered stands in for an answer that did not come.
var Unanswered = &CompiledAnswer{failed: true}

// Answered is the answer of one policy about the request at hand.
type Answered struct {
	Policy string // the policy's name
	Answer *CompiledAnswer
}

// askRef is the compiled form of an AskKey.
type askRef struct {
	AskKey
	fields []fieldRef
}

func (s *Selector) compileAsk(plugin string, in *AskKey) (*askRef, error) {
	a := &askRef{AskKey: *in}
	for _, f := range in.Fields {
		ref, err := s.want(f)
		if err != nil {
			return nil, &Error{Plugin: plugin, Msg: "asks for " + err.Error()}
		}
		a.fields = append(a.fields, ref)
	}
	if a.Bits4 > 32 || a.Bits6 > 128 {
		return nil, &Error{Plugin: plugin, Msg: fmt.Sprintf("asks for %d bits of an IPv4 and %d of an IPv6 address", a.Bits4, a.Bits6)}
	}
	return a, nil
}

// CompileAnswer turns an answer into the numbers of this Selector, and of all
// that With makes from it. The error is an *Error.
func (s *Selector) CompileAnswer(plugin string, in *Answer) (*CompiledAnswer, error) {
	fail := func(server, format string, args ...any) error {
		return &Error{Plugin: plugin, Server: server, Msg: fmt.Sprintf(format, args...)}
	}
	a := &CompiledAnswer{mark: in.Mark, ban: in.Ban}
	kinds := 0
	if len(in.Servers) > 0 {
		kinds++
		a.set = make([]uint64, s.words)
		a.maxScore = 1
		for _, e := range in.Servers {
			n, ok := s.byName[e.Server]
			if !ok {
				return nil, fail(e.Server, notOfFarm)
			}
			setBit(a.set, n)
			if math.IsNaN(e.Score) {
				return nil, fail(e.Server, "has a score that is not a number")
			}
			if e.Score == 0 || e.Score == 1 {
				continue
			}
			if a.scores == nil {
				a.scores = make([]float64, len(s.servers))
				for i := range a.scores {
					a.scores[i] = 1
				}
			}
			a.scores[n] = min(max(e.Score, MinScore), MaxScore)
			a.maxScore = max(a.maxScore, a.scores[n])
		}
		a.text = fmt.Sprintf("servers %v", in.Servers)
	}
	if in.Reject != 0 {
		kinds++
		if in.Reject < 400 || in.Reject > 599 {
			return nil, fail("", "rejects with status %d, which is not within 400 to 599", in.Reject)
		}
		a.kind, a.status, a.retry = ChoiceReject, in.Reject, in.RetryAfter
		a.text = fmt.Sprintf("reject %d", in.Reject)
	}
	if in.Redirect != 0 {
		kinds++
		if err := CheckRedirect(in.Redirect, in.Location); err != nil {
			return nil, fail("", "%v", err)
		}
		a.kind, a.status, a.location = ChoiceRedirect, in.Redirect, in.Location
		a.text = fmt.Sprintf("redirect %d to %s", in.Redirect, in.Location)
	}
	if kinds > 1 {
		return nil, fail("", "answers with more than one of servers, reject and redirect")
	}
	if kinds == 0 {
		a.text = "no opinion"
	}
	return a, nil
}

// SameServers reports whether the two number their servers alike, so that an
// answer compiled for one holds for the other.
func (s *Selector) SameServers(o *Selector) bool {
	return o != nil && len(s.servers) == len(o.servers) && (len(s.servers) == 0 || &s.servers[0] == &o.servers[0])
}

// PolicyName returns the name of a policy by its index.
func (s *Selector) PolicyName(index int) string { return s.policies[index].name }

// AppendKey appends what the policy wants to know of a request, in a form of
// which equal ones are equal questions. ok is false where it is larger than
// MaxQuestion; then the plugin cannot be asked.
func (s *Selector) AppendKey(b []byte, index int, r *Request, sc *Scratch) (key []byte, ok bool) {
	a := s.policies[index].ask
	from := len(b)
	put := func(v []byte) {
		b = binary.AppendUvarint(b, uint64(len(v))+1)
		b = append(b, v...)
	}
	if a.Method {
		put(r.Method)
	}
	if a.Host {
		put(NormalHost(sc.host[:], r.Host))
	}
	if a.Path {
		path := r.Path
		if i := bytes.IndexByte(path, '?'); i >= 0 {
			path = path[:i]
		}
		put(firstSegments(path, int(a.Segments)))
	}
	for i := range a.fields {
		if v := a.fields[i].value(r); v != nil {
			put(v)
		} else {
			b = append(b, 0)
		}
	}
	if a.Client {
		addr := maskAddress(r.Client, a.Bits4, a.Bits6)
		b = append(b, addr[:]...)
	}
	return b, len(b)-from <= MaxQuestion
}

// firstSegments cuts a path behind its n-th segment; 0 keeps all.
func firstSegments(path []byte, n int) []byte {
	if n == 0 {
		return path
	}
	for i, c := range path {
		if c == '/' && i > 0 {
			if n--; n == 0 {
				return path[:i]
			}
		}
	}
	return path
}

// ParseKey reads what AppendKey wrote under the same AskKey.
func (a *AskKey) ParseKey(b []byte) (Key, error) {
	var k Key
	bad := fmt.Errorf("a key of %d bytes does not fit the question", len(b))
	take := func() (v string, present bool, err error) {
		n, w := binary.Uvarint(b)
		if w <= 0 {
			return "", false, bad
		}
		if b = b[w:]; n == 0 {
			return "", false, nil
		}
		if n--; n > uint64(len(b)) {
			return "", false, bad
		}
		v, b = string(b[:n]), b[n:]
		return v, true, nil
	}
	var err error
	for _, part := range []struct {
		on  bool
		out *string
	}{{a.Method, &k.Method}, {a.Host, &k.Host}, {a.Path, &k.Path}} {
		if part.on {
			if *part.out, _, err = take(); err != nil {
				return k, err
			}
		}
	}
	for _, f := range a.Fields {
		kf := KeyField{Field: f}
		if kf.Value, kf.Present, err = take(); err != nil {
			return k, err
		}
		k.Fields = append(k.Fields, kf)
	}
	if a.Client {
		if len(b) != 16 {
			return k, bad
		}
		addr := netip.AddrFrom16([16]byte(b)).Unmap()
		bits, want := addr.BitLen(), int(a.Bits6)
		if addr.Is4() {
			want = int(a.Bits4)
		}
		if want != 0 {
			bits = min(bits, want)
		}
		k.Client = netip.PrefixFrom(addr, bits)
		b = b[16:]
	}
	if len(b) != 0 {
		return k, bad
	}
	return k, nil
}

// Equal reports whether two keys ask for the same.
func (a *AskKey) Equal(o *AskKey) bool {
	if a == nil || o == nil {
		return a == o
	}
	return a.Method == o.Method && a.Host == o.Host && a.Path == o.Path && a.Segments == o.Segments &&
		a.Client == o.Client && a.Bits4 == o.Bits4 && a.Bits6 == o.Bits6 && slices.Equal(a.Fields, o.Fields)
}

func parseAddress(s string) ([16]byte, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return [16]byte{}, fmt.Errorf("%q is not an address", s)
	}
	return a.As16(), nil
}

// answer returns the answer of a policy among those that came, nil if there is
// none yet.
func (r *Request) answer(policy string) *CompiledAnswer {
	for i := range r.Answers {
		if r.Answers[i].Policy == policy {
			return r.Answers[i].Answer
		}
	}
	return nil
}
