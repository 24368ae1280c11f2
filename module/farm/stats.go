// SPDX-License-Identifier: Apache-2.0

package farm

import (
	"sync/atomic"

	"github.com/weirgate/weir/policies/snapshot"
)

// FarmStats counts what happened in a farm since it came into being. All
// fields but Waiting, Held and Clients only grow. Every shard adds, anybody reads; two counters
// read one after the other need not be of one moment.
type FarmStats struct {
	ClientConnections atomic.Uint64 // accepted
	Requests          atomic.Uint64 // heads completed
	Responses         atomic.Uint64 // delivered to the end
	OwnAnswers        atomic.Uint64 // requests answered by the engine itself
	Opened            atomic.Uint64 // server connections begun
	Reused            atomic.Uint64 // requests that found an idle server connection
	Redispatched      atomic.Uint64 // requests sent to another server after a failure
	Waited            atomic.Uint64 // requests that had to wait for a connection
	WaitRefused       atomic.Uint64 // requests refused because max_waiting was reached
	WaitTimedOut      atomic.Uint64 // requests that waited for wait_timeout in vain
	BytesIn           atomic.Uint64 // payload from clients to servers
	BytesOut          atomic.Uint64 // payload from servers to clients

	Waiting atomic.Int32 // requests that wait now, over all shards
	Held    atomic.Int64 // bytes that engines hold of clients, but for the first 4 KiB of each
	Clients atomic.Int32 // client connections with a record now, over all shards

	ConnectionsRefused [RefuseKinds]atomic.Uint64 // new client connections, by limit

	Dispatch        Histogram     // from the end of a request's head until it got a server connection
	ClientRoundTrip Histogram     // as handshakes show it
	Retransmitted   atomic.Uint64 // segments that clients sent again
	Live            snapshot.FarmLive
}

// PolicyStats counts what a policy of a farm did since it came into the farm's
// list.
type PolicyStats struct {
	Decided   atomic.Uint64 // requests that it rejected, redirected, held or gave to its affinity's server
	Emptied   atomic.Uint64 // left no candidate, and was ignored
	Skipped   atomic.Uint64 // its affinity's server was no candidate
	Compared  atomic.Uint64 // shadow: had an opinion
	Disagreed atomic.Uint64 // shadow: would have decided otherwise
	Asked     atomic.Uint64 // requests for which its plugin was asked
	Cached    atomic.Uint64 // requests for which an answer was at hand
	Late      atomic.Uint64 // requests that got no answer
}

// ServerStats counts what happened with a server since it came into being. All
// fields but Open only grow.
type ServerStats struct {
	Requests     atomic.Uint64 // bound to a connection of this server
	Responses    atomic.Uint64 // delivered to the end
	Opened       atomic.Uint64 // connections begun
	Established  atomic.Uint64 // connections whose handshake was completed
	Reused       atomic.Uint64 // requests that found an idle connection
	Redispatched atomic.Uint64 // requests taken away after a failure
	BytesIn      atomic.Uint64 // payload to the server
	BytesOut     atomic.Uint64 // payload from the server
	Closed       [CloseKinds]atomic.Uint64
	Failed       [FailKinds]atomic.Uint64

	ServerErrors         atomic.Uint64 // response heads with a status of 500 to 599
	ConnectTime          Histogram     // of the handshakes that were completed
	FirstByte            Histogram     // from the binding of a request until its response's head: the server's own part
	Latency              Histogram     // from the end of a request's head until its response's head
	Retransmitted        atomic.Uint64 // segments that the server sent again
	RequestRetransmitted atomic.Uint64 // segments of requests that were sent to it again

	// Horizon is how long the server was seen to keep idle connections, in
	// nanoseconds with a margin taken off; 0 is unknown.
	Horizon atomic.Int64

	Open       atomic.Int32 // connections now, those in their handshake too
	Connecting atomic.Int32 // those in their handshake
	// Wanted is set by a shard that found max_connections reached while it has
	// no connection to give back; another one that has an idle connection
	// closes it and clears the flag.
	Wanted atomic.Bool
}

// RefuseKind says which limit a new client connection met.
type RefuseKind uint8

const (
	RefuseTotal  RefuseKind = iota // limits.connections
	RefuseClient                   // limits.per_client
	RefuseKinds  = iota
)

var refuseNames = [RefuseKinds]string{"connections", "per_client"}

// String returns the word for metrics.
func (k RefuseKind) String() string {
	if int(k) < len(refuseNames) {
		return refuseNames[k]
	}
	return "unknown"
}

// CloseKind says why a server connection ended without a failure.
type CloseKind uint8

const (
	CloseIdle     CloseKind = iota // idle_timeout
	CloseSurplus                   // above max_idle, or another shard needed the place
	CloseRetired                   // max_age or max_requests
	CloseServer                    // the server closed or announced it
	CloseIsolated                  // not clean enough to be used again
	CloseAborted                   // the client went away inside an exchange
	CloseRemoved                   // the server was removed or taken out
	CloseStopped                   // the engine stops
	CloseKinds    = iota
)

var closeNames = [CloseKinds]string{"idle", "surplus", "retired", "server", "isolated", "aborted", "removed", "stopped"}

// String returns the word for metrics and tables.
func (k CloseKind) String() string {
	if int(k) < len(closeNames) {
		return closeNames[k]
	}
	return "unknown"
}

// FailKind says how a server failed.
type FailKind uint8

const (
	FailRefused     FailKind = iota // a RST answered the SYN
	FailUnreachable                 // nothing answered the SYN within the connect timeout
	FailReset                       // a RST inside an exchange
	FailClosed                      // a FIN before the response was complete
	FailSilent                      // no byte for the response timeout
	FailResponse                    // a response that cannot be framed
	FailKinds       = iota
)

var failNames = [FailKinds]string{"refused", "unreachable", "reset", "closed", "silent", "response"}

// String returns the word for metrics and tables.
func (k FailKind) String() string {
	if int(k) < len(failNames) {
		return failNames[k]
	}
	return "unknown"
}
