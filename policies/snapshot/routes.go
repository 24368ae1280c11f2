// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unsafe"
)

// The route table. A look-up walks the host once from its end and the path once
// from its start, keeping a running hash, and asks a hash table only where a
// name or prefix of that length can end. Its cost is bounded by the longest
// host and path in the table, whatever a client sends.

// maxHost is the longest host name that is looked at (RFC 1035 section 2.3.4).
const maxHost = 255

// maxRoutePath is the longest path or prefix of a route, in bytes.
const maxRoutePath = 4096

// maxLevels bounds how many hosts of the table can match one name: itself, a
// wildcard per label, and any.
const maxLevels = maxHost/2 + 3

type routeTable struct {
	hosts   hashTable // reversed hash of "name" or ".suffix" of a wildcard; value: level
	paths   hashTable // value: target
	levels  []level   // per host; level 0 is any host
	targets []target
	sets    []uint64 // server sets, words each
	words   int
	deflt   int32 // target for what no route matches, or -1
	wild    bool  // there are wildcard hosts

	// Where routes of one host and path ask for fields, the path's value is
	// conditional and an index of groups.
	groups  []group
	alts    []alternative
	matches []match
}

// conditional marks a value of routeTable.paths that is an index of groups.
const conditional = 1 << 31

// group are the routes of one host and path: alternatives, those that ask for
// most first, and the one that asks for nothing.
type group struct {
	first, n int   // in alts
	deflt    int32 // target, or -1
}

type alternative struct {
	first, n int // in matches; all have to match
	target   int32
}

type match struct {
	field fieldRef
	value string // "": any, but it has to be there
}

// resolve returns the target that a value of paths stands for, -1 for none.
func (t *routeTable) resolve(v uint32, r *Request) int32 {
	if v&conditional == 0 {
		return int32(v)
	}
	g := &t.groups[v&^conditional]
alternatives:
	for i := range t.alts[g.first : g.first+g.n] {
		a := &t.alts[g.first+i]
		for j := range t.matches[a.first : a.first+a.n] {
			m := &t.matches[a.first+j]
			if got := m.field.value(r); got == nil || m.value != "" && string(got) != m.value {
				continue alternatives
			}
		}
		return a.target
	}
	return g.deflt
}

// level is what is known about the paths below one host.
type level struct {
	name    string    // as in the route, for people
	longest int       // the longest path or prefix
	lens    [4]uint64 // the lengths that prefixes have; 255 stands for all above
}

func (l *level) has(n int) bool {
	n = min(n, 255)
	return l.lens[n>>6]&(1<<(n&63)) != 0
}

type target struct {
	kind     ChoiceKind // server, reject, redirect
	status   uint16
	retry    uint32
	set      int // offset in sets
	location string
	name     string // the route, for people
}

// Kinds of keys in a hashTable; they are mixed into the hash.
const (
	keyHost uint8 = iota
	keyWildcard
	keyExact
	keyPrefix
)

// hashTable is an open hash table in three arrays. It is filled once.
type hashTable struct {
	slots   []uint32 // entry+1, or 0
	entries []hashEntry
	keys    []byte
}

type hashEntry struct {
	hash  uint64
	off   uint32
	len   uint16
	kind  uint8
	level uint32
	value uint32
}

const (
	fnvOffset = 14695981039346656037
	fnvPrime  = 1099511628211
)

func hashStep(h uint64, c byte) uint64 { return (h ^ uint64(c)) * fnvPrime }

func hashSeed(level uint32) uint64 { return (fnvOffset ^ uint64(level)) * fnvPrime }

// hashEnd spreads the running hash over all bits (the finaliser of splitmix64).
func hashEnd(h uint64, kind uint8) uint64 {
	h ^= uint64(kind) << 56
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

func (t *hashTable) add(hash uint64, kind uint8, level uint32, key string, value uint32) {
	t.entries = append(t.entries, hashEntry{hash, uint32(len(t.keys)), uint16(len(key)), kind, level, value})
	t.keys = append(t.keys, key...)
}

// build fills the slots; at most half of them are used.
func (t *hashTable) build() {
	n := 1
	for n < 2*len(t.entries) {
		n *= 2
	}
	t.slots = make([]uint32, n)
	mask := uint64(n - 1)
	for i := range t.entries {
		p := t.entries[i].hash & mask
		for t.slots[p] != 0 {
			p = (p + 1) & mask
		}
		t.slots[p] = uint32(i + 1)
	}
}

func (t *hashTable) find(hash uint64, kind uint8, level uint32, key []byte) (uint32, bool) {
	if len(t.slots) == 0 {
		return 0, false
	}
	mask := uint64(len(t.slots) - 1)
	for p := hash & mask; t.slots[p] != 0; p = (p + 1) & mask {
		e := &t.entries[t.slots[p]-1]
		if e.hash == hash && e.kind == kind && e.level == level && int(e.len) == len(key) &&
			bytes.Equal(t.keys[e.off:e.off+uint32(e.len)], key) {
			return e.value, true
		}
	}
	return 0, false
}

// NormalHost writes the name that routes compare into buf and returns the part
// of buf that it filled: lower case, without port and without the dot of the
// root. An empty, overlong or malformed host gives an empty name, which only
// routes for any host match. buf must hold 255 bytes.
func NormalHost(buf, host []byte) []byte {
	if len(host) > 0 && host[0] == '[' { // an IPv6 literal, RFC 3986 section 3.2.2
		if i := bytes.IndexByte(host, ']'); i >= 0 {
			host = host[:i+1]
		}
	} else if i := bytes.IndexByte(host, ':'); i >= 0 {
		host = host[:i]
	}
	if n := len(host); n > 0 && host[n-1] == '.' {
		host = host[:n-1]
	}
	if len(host) > maxHost {
		return buf[:0]
	}
	for i, c := range host {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		buf[i] = c
	}
	return buf[:len(host)]
}

// String returns the route as host and path, as errors and commands show it.
func (r *Route) String() string {
	path := r.Path
	if path == "" {
		path = r.Prefix
	}
	s := r.Host + path
	if s == "" {
		s = "*"
	}
	for _, f := range r.Fields {
		s += " " + f.Field.String()
		if f.Value != "" {
			s += "=" + f.Value
		}
	}
	return s
}

type sliceID struct {
	first *string
	len   int
}

func (s *Selector) compileRoutes(plugin string, in *Routes) (*routeTable, error) {
	t := &routeTable{words: s.words, deflt: -1, levels: []level{{name: "*"}}}
	hosts := map[string]uint32{}
	seen := map[string]bool{}
	sets := map[string]int{}
	shared := map[sliceID]int{}
	places := map[string]int{}
	var branches []branch
	var asks [][]FieldMatch // of targets
	fail := func(r *Route, server, format string, args ...any) error {
		e := &Error{Plugin: plugin, Route: "default", Server: server, Msg: fmt.Sprintf(format, args...)}
		if r != nil {
			e.Route = r.String()
		}
		return e
	}
	// serverSet returns where the set of these servers begins in t.sets; equal
	// sets are kept once.
	serverSet := func(r *Route, names []string) (int, error) {
		// Routes from a plugin share their slices: the same slice is the
		// same set.
		id := sliceID{unsafe.SliceData(names), len(names)}
		if at, ok := shared[id]; ok && len(names) > 0 {
			return at, nil
		}
		set := make([]uint64, s.words)
		for _, name := range names {
			i, ok := s.byName[name]
			if !ok {
				return 0, fail(r, name, notOfFarm)
			}
			setBit(set, i)
		}
		key := fmt.Sprint(set)
		at, ok := sets[key]
		if !ok {
			at = len(t.sets)
			sets[key] = at
			t.sets = append(t.sets, set...)
		}
		shared[id] = at
		return at, nil
	}
	for i := range in.Routes {
		r := &in.Routes[i]
		if r.Path != "" && r.Prefix != "" {
			return nil, fail(r, "", "has both a path and a prefix")
		}
		kind, path := keyPrefix, r.Prefix
		if r.Path != "" {
			kind, path = keyExact, r.Path
		}
		if err := CheckPath(path); err != nil {
			return nil, fail(r, "", "%v", err)
		}
		name, wildcard, err := routeHost(r.Host)
		if err != nil {
			return nil, fail(r, "", "%v", err)
		}
		lv := uint32(0)
		if name != "" {
			var ok bool
			if lv, ok = hosts[name]; !ok {
				lv = uint32(len(t.levels))
				hosts[name] = lv
				t.levels = append(t.levels, level{name: r.Host})
				hk := keyHost
				if wildcard {
					hk, t.wild = keyWildcard, true
				}
				h := uint64(fnvOffset)
				for _, c := range slices.Backward([]byte(name)) {
					h = hashStep(h, c)
				}
				t.hosts.add(hashEnd(h, hk), hk, 0, name, lv)
			}
		}
		place := fmt.Sprintf("%d %d %s", lv, kind, path)
		id := place + " " + fieldsID(r.Fields)
		if seen[id] {
			return nil, fail(r, "", "is there twice")
		}
		seen[id] = true
		tg := target{kind: ChoiceServer, retry: r.RetryAfter, location: r.Location, name: r.String()}
		switch {
		case r.Reject != 0 && r.Redirect != 0, len(r.Servers) > 0 && r.Reject|r.Redirect != 0:
			return nil, fail(r, "", "has more than one of servers, reject and redirect")
		case r.Reject != 0:
			if r.Reject < 400 || r.Reject > 599 {
				return nil, fail(r, "", "rejects with status %d, which is not within 400 to 599", r.Reject)
			}
			tg.kind, tg.status = ChoiceReject, r.Reject
		case r.Redirect != 0:
			if err := CheckRedirect(r.Redirect, r.Location); err != nil {
				return nil, fail(r, "", "%v", err)
			}
			tg.kind, tg.status = ChoiceRedirect, r.Redirect
		default:
			if tg.set, err = serverSet(r, r.Servers); err != nil {
				return nil, err
			}
		}
		h := hashSeed(lv)
		for j := range len(path) {
			h = hashStep(h, path[j])
		}
		at, ok := places[place]
		if !ok {
			at = len(branches)
			places[place] = at
			branches = append(branches, branch{hash: hashEnd(h, kind), kind: kind, level: lv, path: path})
		}
		branches[at].routes = append(branches[at].routes, len(t.targets))
		asks = append(asks, r.Fields)
		t.targets = append(t.targets, tg)
		l := &t.levels[lv]
		l.longest = max(l.longest, len(path))
		if kind == keyPrefix {
			n := min(len(path), 255)
			l.lens[n>>6] |= 1 << (n & 63)
		}
	}
	if len(in.Default) > 0 {
		at, err := serverSet(nil, in.Default)
		if err != nil {
			return nil, err
		}
		t.deflt = int32(len(t.targets))
		t.targets = append(t.targets, target{kind: ChoiceServer, set: at, name: "default"})
	}
	for i := range branches {
		b := &branches[i]
		v := uint32(b.routes[0])
		if len(b.routes) > 1 || len(asks[v]) > 0 {
			var err error
			if v, err = s.addGroup(t, b.routes, asks); err != nil {
				return nil, fail(&in.Routes[b.routes[0]], "", "%v", err)
			}
		}
		t.paths.add(b.hash, b.kind, b.level, b.path, v)
	}
	t.hosts.build()
	t.paths.build()
	return t, nil
}

// branch are the routes of one host and path while a table is made.
type branch struct {
	hash   uint64
	kind   uint8
	level  uint32
	path   string
	routes []int // indexes of targets
}

// addGroup makes the group of some routes and returns the value that names it.
func (s *Selector) addGroup(t *routeTable, routes []int, asks [][]FieldMatch) (uint32, error) {
	sorted := slices.Clone(routes)
	slices.SortStableFunc(sorted, func(a, b int) int { return len(asks[b]) - len(asks[a]) })
	g := group{first: len(t.alts), deflt: -1}
	for _, i := range sorted {
		if len(asks[i]) == 0 {
			g.deflt = int32(i)
			continue
		}
		a := alternative{first: len(t.matches), n: len(asks[i]), target: int32(i)}
		for _, f := range asks[i] {
			ref, err := s.want(f.Field)
			if err != nil {
				return 0, err
			}
			t.matches = append(t.matches, match{ref, f.Value})
		}
		t.alts = append(t.alts, a)
		g.n++
	}
	t.groups = append(t.groups, g)
	return uint32(len(t.groups)-1) | conditional, nil
}

// fieldsID is equal for two lists of matches that ask for the same.
func fieldsID(in []FieldMatch) string {
	ids := make([]string, 0, len(in))
	for _, f := range in {
		ids = append(ids, fmt.Sprintf("%s %q", f.Field, f.Value))
	}
	slices.Sort(ids)
	return strings.Join(ids, " ")
}

// routeHost returns the key of a route's host: the normalised name, or the
// suffix with its dot where wildcard; "" is any host.
func routeHost(host string) (key string, wildcard bool, err error) {
	if host == "" || host == "*" {
		return "", false, nil
	}
	name, wildcard := strings.CutPrefix(host, "*.")
	if strings.ContainsAny(name, "*/ \t\r\n@") || len(name) > maxHost-1 {
		return "", false, fmt.Errorf("host %q is neither a name nor *. and a name", host)
	}
	if name == "" || strings.HasPrefix(name, ".") {
		return "", false, fmt.Errorf("host %q has an empty label", host)
	}
	if strings.Contains(name, ":") && !(name[0] == '[' && name[len(name)-1] == ']') {
		return "", false, fmt.Errorf("host %q has a port; routes compare the name alone", host)
	}
	key = string(NormalHost(make([]byte, maxHost), []byte(name)))
	if wildcard {
		key = "." + key
	}
	return key, wildcard, nil
}

// CheckHost says what is wrong with a route's host, nil if nothing.
func CheckHost(host string) error {
	_, _, err := routeHost(host)
	return err
}

// CheckPath says what is wrong with a route's path or prefix, nil if nothing.
func CheckPath(path string) error {
	switch {
	case path == "":
		return nil
	case path[0] != '/':
		return fmt.Errorf("%q does not begin with /", path)
	case len(path) > maxRoutePath:
		return fmt.Errorf("is longer than %d bytes", maxRoutePath)
	}
	for i := range len(path) {
		if c := path[i]; c == '?' || c == '#' {
			return fmt.Errorf("%q contains %q; routes compare the path alone", path, c)
		} else if c <= ' ' || c >= 0x7f {
			return fmt.Errorf("%q contains a byte that a raw path never has; write it percent-encoded", path)
		}
	}
	return nil
}

// CheckRedirect says what is wrong with a redirection, nil if nothing.
func CheckRedirect(status uint16, location string) error {
	switch status {
	case 301, 302, 303, 307, 308:
	default:
		return fmt.Errorf("redirects with status %d, which is none of 301, 302, 303, 307, 308", status)
	}
	if location == "" {
		return fmt.Errorf("redirects without a location")
	}
	for i := range len(location) {
		if c := location[i]; c <= ' ' || c >= 0x7f {
			return fmt.Errorf("redirects to %q, which contains a byte that a URI never has", location)
		}
	}
	return nil
}

// find returns the target for a request, or -1.
func (t *routeTable) find(r *Request, sc *Scratch) int32 {
	path := r.Path
	if i := bytes.IndexByte(path, '?'); i >= 0 {
		path = path[:i]
	}
	if len(t.hosts.entries) > 0 {
		n := t.hostLevels(NormalHost(sc.host[:], r.Host), &sc.levels)
		for n--; n >= 0; n-- { // the host that says most was found last
			if v := t.findPath(sc.levels[n], path, r); v >= 0 {
				return v
			}
		}
	}
	if v := t.findPath(0, path, r); v >= 0 {
		return v
	}
	return t.deflt
}

// hostLevels collects the levels that match the name, those that say least
// first, and returns their number.
func (t *routeTable) hostLevels(name []byte, out *[maxLevels]uint32) int {
	n := 0
	h := uint64(fnvOffset)
	for i := len(name) - 1; i >= 0; i-- {
		h = hashStep(h, name[i])
		if t.wild && name[i] == '.' && i > 0 {
			if lv, ok := t.hosts.find(hashEnd(h, keyWildcard), keyWildcard, 0, name[i:]); ok {
				out[n] = lv
				n++
			}
		}
	}
	if lv, ok := t.hosts.find(hashEnd(h, keyHost), keyHost, 0, name); ok {
		out[n] = lv
		n++
	}
	return n
}

// findPath returns the target of the exact path or else of the longest prefix
// below one host, or -1.
func (t *routeTable) findPath(lv uint32, path []byte, r *Request) int32 {
	l := &t.levels[lv]
	n := min(len(path), l.longest)
	best := int32(-1)
	h := hashSeed(lv)
	for i := 0; ; i++ {
		// A prefix ends where a segment ends: before a '/', behind one, or
		// with the path. The empty prefix matches everything, "*" too.
		if i == 0 || i == len(path) || path[i] == '/' || path[i-1] == '/' {
			if l.has(i) {
				if v, ok := t.paths.find(hashEnd(h, keyPrefix), keyPrefix, lv, path[:i]); ok {
					if v := t.resolve(v, r); v >= 0 {
						best = v
					}
				}
			}
		}
		if i == n {
			break
		}
		h = hashStep(h, path[i])
	}
	if n == len(path) {
		if v, ok := t.paths.find(hashEnd(h, keyExact), keyExact, lv, path); ok {
			if v := t.resolve(v, r); v >= 0 {
				return v
			}
		}
	}
	return best
}
