// SPDX-License-Identifier: Apache-2.0

// Package snapshot holds what policy plugins say about a farm, as flat tables,
// and the one function that chooses a server with them.
//
// A Snapshot is what one plugin said last about one farm, in names. NewSelector
// compiles the snapshots of all policies of a farm, in the farm's order, into a
// Selector: bit sets over server numbers, hash tables in arrays, no pointers to
// follow. A Selector never changes; a new snapshot makes a new Selector, which
// the caller swaps in atomically. Selector.Choose is the only place where Weir
// decides which server answers a request: for a farm without policies, for a
// redispatch after a failure, and for "weir policy explain" it is the same code.
//
// This package must not do I/O, read a clock, start a goroutine, keep state
// between two calls, or import anything of Weir. The time is a field of the
// request, the randomness is an argument, the counters that shards share are
// handed in. Choose does not allocate and takes no lock.
package snapshot

import (
	"fmt"
	"sync/atomic"
)

// MaxServers is how many servers one farm may have. It bounds the bit sets and
// the working memory of a choice.
const MaxServers = 1024

// MaxPolicies is how many policies one farm may list.
const MaxPolicies = 32

// State says whether a server takes new requests.
type State uint32

// The states of a server. Only Ready servers are candidates.
const (
	Ready State = iota // takes requests
	Drain              // finishes what it has, takes nothing new
	Maint              // taken out by an operator
	Down               // does not answer
)

// String returns the word that commands and logs use for the state.
func (s State) String() string {
	switch s {
	case Ready:
		return "ready"
	case Drain:
		return "drain"
	case Maint:
		return "maint"
	case Down:
		return "down"
	}
	return fmt.Sprintf("state(%d)", uint32(s))
}

// Live are the counters of one server that all shards share. Everybody may read
// and write them at any time; they are plain atomics without a common lock, so
// two of them read together may be from slightly different moments. A Live
// fills one cache line, so that shards which count on different servers do not
// disturb each other. The zero value is a ready server without connections.
type Live struct {
	Active  atomic.Int32  // connections that carry a request now
	Waiting atomic.Int32  // requests that wait for a connection to this server
	Idle    atomic.Int32  // open connections that carry none
	State   atomic.Uint32 // a State, which an operator gave it

	// AvoidUntil is until when some policy finds the server not eligible, in
	// nanoseconds since 1970; 0 is not at all. Choose does not look at it: it
	// has the policies themselves. It tells those who keep connections open
	// that nobody will use them.
	AvoidUntil atomic.Int64

	// Spent are the payload bytes, both ways, that count against budgets.
	// Bytes that are certain to come are counted when that is known.
	Spent atomic.Int64
	_     [32]byte
}

// Usable reports whether an idle connection to the server may be of use: it is
// ready, and no policy keeps requests away from it.
func (l *Live) Usable(now int64) bool {
	return State(l.State.Load()) == Ready && now >= l.AvoidUntil.Load()
}

// FarmLive are the counters of a whole farm that choices look at, as Live has
// them for a server.
type FarmLive struct {
	Spent atomic.Int64 // as in Live, over all servers
	_     [56]byte
}

// ServerConfig is one server of a farm. Its place in the slice given to
// NewSelector is its number everywhere else in this package.
type ServerConfig struct {
	Name   string
	Weight uint32 // share of requests relative to the others, 1 to 256; 0 means 1
	Backup bool   // used only when no other candidate is left
}

// OnEmpty says what happens when a policy leaves no candidate.
type OnEmpty uint8

// What a policy that leaves no candidate does.
const (
	OnEmptyDefault OnEmpty = iota // routes and eligibility: reject
	OnEmptyReject                 // answer 404 where no route matches, else 503 with Retry-After
	OnEmptyIgnore                 // go on as if the policy were not there
	OnEmptyWait                   // hold the request and ask again
)

// String returns the word that the configuration uses.
func (o OnEmpty) String() string {
	switch o {
	case OnEmptyDefault:
		return ""
	case OnEmptyReject:
		return "reject"
	case OnEmptyIgnore:
		return "ignore"
	case OnEmptyWait:
		return "wait"
	}
	return fmt.Sprintf("on_empty(%d)", uint8(o))
}

// ParseOnEmpty reads the configuration's word; "" is the default of the kind.
func ParseOnEmpty(word string) (OnEmpty, error) {
	for o := OnEmptyDefault; o <= OnEmptyWait; o++ {
		if o.String() == word {
			return o, nil
		}
	}
	return OnEmptyDefault, fmt.Errorf("on_empty: %q is none of reject, ignore, wait", word)
}

// Snapshot is what one plugin said last about one farm. Parts that it does not
// speak about are nil. Once handed over it belongs to its readers and must not
// be changed.
type Snapshot struct {
	Plugin     string
	Generation uint64 // counts up whenever the plugin says something new

	Routes      *Routes
	Affinity    *Affinity
	Eligibility *Eligibility
	Budgets     *Budgets
	Scores      *Scores

	// Expires is when Eligibility, Budgets and Scores stop to hold, in
	// nanoseconds since 1970 (time.Time.UnixNano); 0 is never. Routes and
	// Affinity hold for ever: they are configuration, and a plugin that died
	// has not taken them back.
	Expires int64
}

// Routes sends requests to groups of servers by host and path. The order of the
// routes does not matter: the host that says most wins (exact, then the longest
// wildcard, then any host), under it the exact path, then the longest prefix.
// Where a host has no matching path the next host that says less is asked.
type Routes struct {
	Routes  []Route
	Default []string // servers for requests that no route matches; may be empty
}

// Route is one line of Routes: where Host and Path or Prefix match, Target
// holds. A route with neither Path nor Prefix matches every path.
//
// Routes for the same host and path may differ in what fields they ask for. Of
// those whose fields all match, the one that asks for most holds, of equals the
// first in the list; where none matches, the next shorter prefix is asked.
type Route struct {
	Host   string       // "" or "*": any; "*.example.org": every name below; without port
	Path   string       // the whole path, before any '?'
	Prefix string       // the path's beginning, ending at a '/' or at the path's end
	Fields []FieldMatch // all have to match
	Target
}

// FieldMatch asks for the value of a header field or cookie, byte by byte. Of
// a field that is there several times, the first counts.
type FieldMatch struct {
	Field Field
	Value string // "": any, but it has to be there
}

// Target is what a route does: exactly one of Servers, Reject and Redirect.
type Target struct {
	Servers    []string
	Reject     uint16 // a status, 400 to 599
	RetryAfter uint32 // seconds, with Reject; 0: no such field
	Redirect   uint16 // 301, 302, 303, 307 or 308
	Location   string // with Redirect
}

// Eligibility says which servers may be used. A server that is not listed may.
type Eligibility struct {
	Servers []Eligible
}

// Eligible is the verdict on one server.
type Eligible struct {
	Server   string
	Eligible bool
	Reason   string // why not, for people; not parsed
}

// Scores multiply the servers' weights. A server that is not listed has 1.
type Scores struct {
	Servers []Score
}

// MinScore and MaxScore bound a score; what lies outside is moved to the
// bound. A score therefore never excludes a server.
const (
	MinScore = 0.01
	MaxScore = 100
)

// Score is the factor for one server; higher is better.
type Score struct {
	Server string
	Score  float64
}

// Policy is one entry of a farm's list of policies.
type Policy struct {
	Name     string    // the plugin's name
	OnEmpty  OnEmpty   // what to do when it leaves no candidate
	Snapshot *Snapshot // nil until the plugin sent the first one

	// RoutePolicy says that the plugin sends routes. Until they are there
	// requests get 503: without them any server might be the wrong one.
	RoutePolicy bool

	// Shadow says that the policy decides nothing: it is only compared with
	// what was decided.
	Shadow bool

	// Ask says that the plugin wants to be asked about requests, and for what
	// it wants to know of them; nil: it does not. Fallback is what to do when
	// there is no answer in time.
	Ask      *AskKey
	Fallback Fallback
}

// Request is what Choose looks at. The slices are only read, and not kept.
type Request struct {
	Method []byte
	Host   []byte   // the Host field or the authority of an absolute target, as sent; may be empty
	Path   []byte   // the raw target from its first '/' on; a query may follow
	Client [16]byte // the client's address, IPv4 in its mapped form
	Now    int64    // nanoseconds since 1970, to compare with Snapshot.Expires

	// Fields are the values of the fields that Selector.Fields names, in its
	// order, nil where the request has none. A shorter slice is as good as one
	// filled up with nil.
	Fields [][]byte

	// Farm are the counters of the whole farm; nil: budgets of the farm are
	// not looked at.
	Farm *FarmLive

	// Answers are what plugins answered about this request so far.
	Answers []Answered
}

// Tried are the servers that a request already was at.
type Tried [MaxServers / 64]uint64

// Set adds a server.
func (t *Tried) Set(server int) { t[server>>6] |= 1 << (server & 63) }

// Has reports whether the server was tried.
func (t *Tried) Has(server int) bool { return t[server>>6]&(1<<(server&63)) != 0 }

// Reset forgets all.
func (t *Tried) Reset() { *t = Tried{} }

// ChoiceKind is what to do with a request.
type ChoiceKind uint8

// The kinds of choices.
const (
	ChoiceServer   ChoiceKind = iota // send it to Choice.Server
	ChoiceReject                     // answer Choice.Status
	ChoiceRedirect                   // answer Choice.Status with Choice.Location
	ChoiceWait                       // hold it and ask again
	ChoiceAsk                        // ask the policy Choice.Policy about it, then choose again with its answer
)

// String names the kind.
func (k ChoiceKind) String() string {
	switch k {
	case ChoiceServer:
		return "server"
	case ChoiceReject:
		return "reject"
	case ChoiceRedirect:
		return "redirect"
	case ChoiceWait:
		return "wait"
	case ChoiceAsk:
		return "ask"
	}
	return fmt.Sprintf("choice(%d)", uint8(k))
}

// Reason says why a choice came out as it did. Each is one counter, one log
// attribute and one column for people.
type Reason uint8

// The reasons of choices.
const (
	ReasonPicked        Reason = iota // one of the candidates was drawn
	ReasonNoServer                    // no server of the farm is ready and untried
	ReasonNoRoute                     // no route matches
	ReasonRouteReject                 // the route rejects
	ReasonRouteRedirect               // the route redirects
	ReasonRoutesPending               // the route policy has not sent its routes yet
	ReasonRouteEmpty                  // no server of the route is left
	ReasonNotEligible                 // no candidate is eligible
	ReasonAffinity                    // the affinity's server was taken
	ReasonOverBudget                  // every candidate is in debt
	ReasonAsked                       // the plugin's answer rejects, redirects, or is to be waited for
	ReasonAnswerEmpty                 // no server of the answer is left
	ReasonUnanswered                  // no answer came in time
	NumReasons
)

var reasonNames = [NumReasons]string{
	"picked", "no_server", "no_route", "route_reject", "route_redirect",
	"routes_pending", "route_empty", "not_eligible", "affinity", "over_budget",
	"asked", "answer_empty", "unanswered",
}

// String returns the reason's name in metrics and logs.
func (r Reason) String() string {
	if r < NumReasons {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// NoPolicy is Choice.Policy where no policy decided.
const NoPolicy = 255

// RetryAfter is what a 503 from Choose asks the client to wait, in seconds.
const RetryAfter = 1

// Choice is the answer of Choose.
type Choice struct {
	Kind       ChoiceKind
	Reason     Reason
	Policy     uint8  // the index of the policy that decided, or NoPolicy
	Server     uint16 // the server's number, with ChoiceServer
	Status     uint16 // with ChoiceReject and ChoiceRedirect
	RetryAfter uint32 // seconds, with ChoiceReject; 0: no such field
	Location   string // with ChoiceRedirect; owned by the Selector

	Mark uint32 // for the connection, from an answer; 0: none
	Ban  uint32 // seconds for which the client is to be kept away, from an answer; 0: not at all

	// What else happened, one bit per policy by its index.
	Emptied   uint32 // left no candidate, and was ignored
	Skipped   uint32 // its affinity's server was no candidate
	Compared  uint32 // a shadow that had an opinion
	Disagreed uint32 // of those, the ones that would have decided otherwise

	// Candidates is how many servers the draw was among. The states of a
	// large set are looked at only as far as the draw needs them, so that
	// above 32 it may count servers that are not ready.
	Candidates uint16
}
