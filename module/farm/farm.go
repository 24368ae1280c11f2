// SPDX-License-Identifier: Apache-2.0

// Package farm is the database of farms and servers (the patent's "database of
// servers and server farms", step 706): what the engine looks up to serve a
// connection.
//
// A DB is one immutable generation. A reload builds the next one from the
// previous one and a Spec, and the engine loads the current one by an atomic
// pointer once per batch. What must outlive a generation is shared between
// generations by pointer: the live counters that the choice of a server looks
// at, the cumulative counters, and the numbers that flow records hold instead
// of pointers.
//
// Servers and farms that a new generation no longer has stay findable by their
// numbers as removed ones, because connections to them still run; Forget drops
// them when the last one has ended.
//
// The package must not do I/O, read a clock, start a goroutine, know where a
// Spec comes from, or speak to plugins. Lookups do not allocate and take no
// lock.
package farm

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

// DB is one immutable generation. The zero DB is empty and ready to use.
type DB struct {
	Generation uint64    // counts up with every Build and Forget, from 1
	Farms      []*Farm   // in the order of the Spec; no removed ones
	Removed    []*Farm   // farms that are gone but have servers with connections
	Draining   []*Server // removed servers of all farms, removed or not

	snips   map[packet.Addr]struct{}
	vips    map[packet.Endpoint]*Farm
	farms   []*Farm   // by ID - 1; nil: none
	servers []*Server // by ID - 1; nil: none

	nextFarm, nextServer uint16 // the IDs given out last
}

// ByVIP returns the farm that listens there, nil if none does.
func (db *DB) ByVIP(ep packet.Endpoint) *Farm { return db.vips[ep] }

// EachVIP calls f with every address at which a farm listens, and the number of
// that farm, in no order.
func (db *DB) EachVIP(f func(vip packet.Endpoint, farm uint16)) {
	for vip, of := range db.vips {
		f(vip, of.ID)
	}
}

// FarmByID returns the farm with that ID, a removed one too, or nil once it is
// forgotten.
func (db *DB) FarmByID(id uint16) *Farm {
	if i := int(id) - 1; i >= 0 && i < len(db.farms) {
		return db.farms[i]
	}
	return nil
}

// Server returns the server with that ID, a removed one too, or nil once it is
// forgotten.
func (db *DB) Server(id uint16) *Server {
	if i := int(id) - 1; i >= 0 && i < len(db.servers) {
		return db.servers[i]
	}
	return nil
}

// FarmByName returns the farm of that name, nil if there is none. Removed
// farms have no name to be found by.
func (db *DB) FarmByName(name string) *Farm {
	for _, f := range db.Farms {
		if f.Name == name {
			return f
		}
	}
	return nil
}

// IsSNIP reports whether server connections are made from this address.
func (db *DB) IsSNIP(a packet.Addr) bool {
	_, ok := db.snips[a]
	return ok
}

// Farm is a set of servers behind one or more VIPs, all of one address family.
// It does not change, but for Selector and what the pointers in it count.
type Farm struct {
	ID         uint16 // from 1; stable while a farm of this name exists
	Name       string
	Generation uint64 // of the DB that made this Farm
	Removed    bool   // gone; no new connection and no new request belongs here

	VIPs      []packet.Endpoint
	Servers   []*Server        // the choice's numbers are indexes of this slice
	Lives     []*snapshot.Live // of Servers, in the same order
	SNIPs     []packet.Addr    // of the farm's family
	Pool      PoolLimits
	Timeouts  Timeouts
	Limits    Limits
	Forwarded ForwardedMode
	// ForwardedTrust are the clients whose own forwarding fields are kept: the
	// proxies in front.
	ForwardedTrust []netip.Prefix
	RouteSafety    RouteSafety
	Policies       []snapshot.Policy // as given in the Spec

	// Selector is what the engine chooses with; it is never nil, and its
	// servers are Servers. Whoever collects the plugins' snapshots swaps it by
	// SetSelector, in the newest generation; Build copies the one of the
	// generation before, so swaps and builds take turns.
	Selector atomic.Pointer[snapshot.Selector]
	// Wanted are the fields of requests that the Selector looks at; nil: none.
	// A head that was scanned for another set is scanned again.
	Wanted atomic.Pointer[http1.Wanted]
	// PolicyStats are the counters of Policies, in the same order, shared by
	// the generations that have a policy of the name.
	PolicyStats []*PolicyStats

	Stats *FarmStats // shared by all generations
}

// StatsOf returns the counters of a policy by its name, nil if the farm has none
// of that name.
func (f *Farm) StatsOf(policy string) *PolicyStats { return f.policyStats(policy) }

// CountLate counts a request to which a policy's plugin gave no answer.
func (f *Farm) CountLate(policy string) {
	if st := f.policyStats(policy); st != nil {
		st.Late.Add(1)
	}
}

// SetSelector puts a Selector into use, together with the fields that it looks
// at.
func (f *Farm) SetSelector(s *snapshot.Selector) error {
	var w *http1.Wanted
	if names := s.Fields(); len(names) > 0 {
		if w = f.Wanted.Load(); w == nil || !sameNames(w, names) {
			var err error
			if w, err = http1.NewWanted(names...); err != nil {
				return fmt.Errorf("farm %q: %w", f.Name, err)
			}
		}
	}
	f.Wanted.Store(w)
	f.Selector.Store(s)
	return nil
}

func sameNames(w *http1.Wanted, names []string) bool {
	if w.Len() != len(names) {
		return false
	}
	for i, n := range names {
		if w.Name(i) != n {
			return false
		}
	}
	return true
}

// Is4 reports whether the farm is served over IPv4.
func (f *Farm) Is4() bool { return len(f.VIPs) > 0 && f.VIPs[0].Addr.Is4() }

// NoIndex is the Index of a removed server.
const NoIndex = 0xffff

// Server is one server of one farm. It does not change, but for what the
// pointers in it count.
type Server struct {
	ID       uint16 // from 1; stable while this name with this address is in the farm
	Index    uint16 // in Farm.Servers, or NoIndex
	Name     string
	Farm     *Farm // of the same generation; the last one it was in once its farm is removed
	Endpoint packet.Endpoint
	Weight   uint32 // 1 to 256
	Backup   bool

	Live  *snapshot.Live // shared by all generations
	Stats *ServerStats   // shared by all generations
}

// Removed reports whether the server is only there until its connections have
// ended.
func (s *Server) Removed() bool { return s.Index == NoIndex }

// PoolLimits are the limits of the server connections. 0 is no limit.
type PoolLimits struct {
	MaxIdle        int32 // per server, over all shards
	MaxConnections int32 // per server, over all shards
	MinIdle        int32 // per server, over all shards
	MaxConnecting  int32 // handshakes at once per server, over all shards
	IdleTimeout    int64 // ns
	MaxRequests    uint32
	MaxAge         int64 // ns
	MaxWaiting     int32 // per farm, over all shards
	WaitTimeout    int64 // ns
	DrainLimit     int64 // bytes
	DrainTimeout   int64 // ns
}

// Timeouts are the time limits of one exchange in nanoseconds, all above 0.
type Timeouts struct {
	Connect  int64 // establishment of a server connection
	Head     int64 // from the first byte of a request to the end of its head
	Body     int64 // over which the pace of a request's body is measured; 0 means no pace
	Idle     int64 // a client connection between requests
	Response int64 // silence of the server while a response is due
	Tunnel   int64 // silence of both sides of an upgraded connection; 0 means an hour
	Drain    int64 // exchanges whose server or VIP is gone; not the engine's business
}

// DefaultTimeouts serve a connection of whose farm nothing is known any more.
var DefaultTimeouts = Timeouts{Connect: 5e9, Head: 15e9, Idle: 60e9, Response: 60e9, Drain: 60e9}

// known reports whether all are there that must be.
func (t *Timeouts) known() bool {
	return min(t.Connect, t.Head, t.Idle, t.Response) > 0 && min(t.Body, t.Tunnel) >= 0
}

// Limits bounds what clients may send. A 0 is the engine's own limit, which
// suits public servers.
type Limits struct {
	Head     uint32 // a request head, bytes
	Fields   uint16 // field lines of a request head
	Target   uint16 // the request target, bytes
	ChunkExt uint16 // the extensions of one chunk line, bytes
	Trailers uint32 // the trailer section, bytes
	BodyRate int64  // least pace of a request's body, bytes per second; 0 is no limit
	// Connections of clients at once, over all shards, 0 is no limit: in total,
	// and of one client, which is an IPv4 address or an IPv6 /64.
	Connections, PerClient int32
	Held                   int64 // bytes held of all clients, but for the first 4 KiB of each; 0 is no limit
}

// RouteSafety says what happens to a request whose path a server may read as
// another one than the routes do.
type RouteSafety uint8

const (
	RouteSafetyAuto   RouteSafety = iota // reject where the farm has routes
	RouteSafetyReject                    // answer 400
	RouteSafetyPass                      // the servers' business
)

var routeSafetyNames = [...]string{"", "reject", "pass"}

// ParseRouteSafety reads the word of the configuration.
func ParseRouteSafety(s string) (r RouteSafety, ok bool) {
	for i, n := range routeSafetyNames {
		if n == s {
			return RouteSafety(i), true
		}
	}
	return 0, false
}

// Trusts reports whether a client's own forwarding fields are to be kept.
func (f *Farm) Trusts(a packet.Addr) bool {
	if len(f.ForwardedTrust) == 0 {
		return false
	}
	addr := a.Netip()
	for _, p := range f.ForwardedTrust {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// ForwardedMode says which field tells the servers the client's address.
type ForwardedMode uint8

const (
	ForwardedNone    ForwardedMode = iota
	ForwardedXFF                   // X-Forwarded-For
	ForwardedRFC7239               // Forwarded (RFC 7239)
)

var forwardedNames = [...]string{"none", "x-forwarded-for", "forwarded"}

// String returns the word of the configuration.
func (m ForwardedMode) String() string {
	if int(m) < len(forwardedNames) {
		return forwardedNames[m]
	}
	return "unknown"
}

// ParseForwarded reads the word of the configuration.
func ParseForwarded(s string) (m ForwardedMode, ok bool) {
	for i, n := range forwardedNames {
		if n == s {
			return ForwardedMode(i), true
		}
	}
	return 0, false
}
