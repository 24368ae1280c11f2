// SPDX-License-Identifier: Apache-2.0

package splice

import (
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/packet"
)

// RecordVersion changes whenever a record gets another field. A program reads
// the records of its own version, of the one before and of the one after, see
// reserve.
const RecordVersion = next + 7

// Ref names a record of a flow table; 0 is none.
type Ref uint32

// ClientState is the life of a client connection as the engine sees it:
//
//	COOKIE (no state) → EMBRYO → HEAD → BINDING → SPLICED → (HEAD …)
//	                                 ↘ ANSWERING ↗        → CLOSING → TOMBSTONE
//
// Cookie, embryo and tombstone are not records of this type: they cost less.
type ClientState uint8

const (
	ClientFree      ClientState = iota
	ClientHead                  // waits for, or collects, a request head
	ClientBinding               // a head is complete; waits for a server connection
	ClientSpliced               // translated to a server connection
	ClientAnswering             // the engine's own response is on its way
	ClientClosing               // our FIN is sent, or the client's is answered
)

func (s ClientState) String() string {
	return [...]string{"free", "head", "binding", "spliced", "answering", "closing"}[s]
}

// ServerState is the life of a pooled connection.
type ServerState uint8

const (
	ServerFree       ServerState = iota
	ServerConnecting             // our SYN is out
	ServerIdle                   // in the pool
	ServerActive                 // one client's request is on it
	ServerDraining               // its client is gone, its response still runs
	ServerClosing                // our FIN is out
)

func (s ServerState) String() string {
	return [...]string{"free", "connecting", "idle", "active", "draining", "closing"}[s]
}

// ClientFlags are facts about a client connection.
type ClientFlags uint32

const (
	ClientSACK        ClientFlags = 1 << iota // both ends agreed on SACK
	ClientWantClose                           // close after the present response
	ClientFINSeen                             // the client's FIN is in order and absorbed; its number is CliFIN
	ClientFINSent                             // our FIN is sent; its number is OurFIN
	ClientReqEndKnown                         // ReqEnd is valid
	ClientReqBad                              // the request's framing broke in its body: abort
	ClientHeadRequest                         // the request's method is HEAD
	ClientIdempotent                          // a redispatch without proof is allowed
	ClientResponded                           // a byte of the response has passed
	ClientWaiting                             // stands in the farm's waiting line
	ClientStop                                // close as soon as nothing runs
	ClientFresh                               // the next attempt takes a new connection
	ClientWasReset                            // we reset the connection
	ClientEarlyAck                            // bytes of the held request are acknowledged by us
	ClientUpgrade                             // the request asks for another protocol: a 101 is an answer to it
	ClientExpect                              // the body waits for 100 (Continue)
	ClientFINPassed                           // the client's FIN was passed on through a tunnel; its number is CliFIN
	ClientCounted                             // the engine's census holds it
	ClientCopy                                // the server gets its request from our copy of the first Held bytes
	ClientEdited                              // that copy differs from what the client sent
	ClientSwapped                             // the held bytes stand in the second area of the side's mirror
	ClientNoMirror                            // they could not be mirrored
)

// Client is the record of one client connection: flat, fixed size, without
// pointers. Sequence numbers are those of the client side unless the name says
// otherwise; times are the engine's clock in nanoseconds.
type Client struct {
	State  ClientState
	Scale  uint8 // the client's window shift, NoScale = none
	Method http1.Method
	Flags  ClientFlags
	Farm   uint16
	MSS    uint16 // largest payload toward the client, bytes

	IRS, ISS packet.Seq // RFC 9293: first numbers of the client and of us
	RcvNxt   packet.Seq // next in-order byte expected from the client
	RcvAcked packet.Seq // highest acknowledgment sent to the client
	SndUna   packet.Seq // highest acknowledgment from the client
	SndNxt   packet.Seq // end of what was sent to the client
	SndWnd   uint32     // the client's true window, bytes
	CliFIN   packet.Seq // number of the client's FIN (ClientFINSeen)
	OurFIN   packet.Seq // number of our FIN (ClientFINSent)

	Srv     Ref        // bound server connection
	Own     Ref        // first of the server connections that are private to this client, see Server.Next
	Kept    uint32     // the engine's memory of segments beyond a gap, 0 = none
	Side    uint32     // the engine's side memory (held bytes), 0 = none
	Epoch   Epoch      // equations of the present request
	Mark    uint32     // of packets of the present exchange, from a policy; 0 = none
	HeadLen uint32     // client's bytes of the present head
	ReqEnd  packet.Seq // end of the present request (ClientReqEndKnown)
	ReqBody http1.Body // cursor through the request's body, at RcvNxt

	Octave    uint8      // of the round-trip time, see pool.Octave
	Attempts  uint8      // dispatches of the present request
	Tries     uint8      // retransmissions of what is ours
	Loop      uint8      // turns of bare ACKs without news
	Said      [2]uint32  // what the last bare ACK of each side said
	AnswerSeq packet.Seq // first byte of our own answer
	PaceSeq   packet.Seq // RcvNxt when the pace of the request's body was looked at last
	Pace      int64      // when that was, 0 = the body has no pace to keep
	Started   int64      // present request's first byte, from the end of its head on that moment, or that of idleness
	Last      int64      // last packet of either side
	Due       int64      // when something must happen, 0 = nothing special
	CloseBy   int64      // closing or lingering ends
	Waits     int64      // stands in the waiting line until
	LastACK   int64      // last rate-limited ACK

	Held, Next uint32 // lengths of the side's bytes, as of the last step; see the engine's store

	Suspect   uint8 // steps about it of which an engine died
	SuspectAt int64 // when that was the last time

	HeldSum, NextSum uint32 // checksums of the side's bytes, since version 5
	_                [reserve - 8]byte
}

// reserve is room for the fields of later versions, zero until then. A record
// keeps its size, so that a version reads the records of the one before and of
// the one after: what it does not know means the same as zero to it.
const reserve = 32

// ServerFlags are facts about a server connection.
type ServerFlags uint16

const (
	ServerSACK       ServerFlags = 1 << iota
	ServerNoReuse                // must not go back to the pool
	ServerFINSeen                // the server's FIN is in order
	ServerReqSent                // all of the request was forwarded
	ServerReqEnd                 // ReqEnd is valid
	ServerRespEnd                // RespEnd is valid
	ServerHeadDone               // the final response head is complete
	ServerUntilClose             // the response ends with the connection
	ServerPreopened              // opened ahead, without a client
	ServerFINAcked               // the server acknowledged our FIN
	ServerTunnel                 // after a 101: both directions pass without framing, FINs too
	ServerPrivate                // its authentication belongs to one client, who keeps it
	ServerEarly                  // the present response head began before the server had the whole request
	ServerBudgeted               // the exchange's bytes count against a budget
	ServerReserved               // those of the response do already
)

// Server is the record of one pooled connection. Sequence numbers are those of
// the server side.
type Server struct {
	State  ServerState
	Scale  uint8 // the server's window shift, NoScale = none
	Class  uint8 // options class, see package pool
	Flags  ServerFlags
	Farm   uint16
	ID     uint16 // farm.Server.ID
	MSS    uint16 // largest payload toward the server, bytes
	Reason uint8  // why it will not be reused, engine.Reason
	Octave uint8  // of the last client

	ISS, IRS packet.Seq
	SndUna   packet.Seq // highest acknowledgment from the server
	SndNxt   packet.Seq // end of what was sent to the server
	SndEdge  packet.Seq // right edge of the server's window
	RcvNxt   packet.Seq // end of what was seen in order
	RcvHigh  packet.Seq // end of the highest byte that was seen
	RcvAcked packet.Seq // highest acknowledgment sent to the server
	RcvEdge  packet.Seq // right edge of the largest window that the server was given
	SndBase  packet.Seq // present epoch: first byte of the request
	RcvBase  packet.Seq // present epoch: first byte of the response
	ReqEnd   packet.Seq // end of the request (ServerReqEnd)
	RespEnd  packet.Seq // end of the response (ServerRespEnd)

	Cli  Ref    // bound client, or the owner of a private connection
	Next Ref    // next one that is private to the same client
	Kept uint32 // as in Client
	Resp http1.ResponseHead
	Body http1.Body

	Requests  uint32 // served on this connection
	Tries     uint8  // retransmissions of SYN or FIN
	Drained   uint32 // bytes acknowledged for a client that left
	HorizonMS uint32 // the server's Keep-Alive hint, 0 = none
	Opened    int64
	Bound     int64 // when the present epoch began
	Idle      int64 // since when idle
	Last      int64
	Due       int64
	LastACK   int64

	Suspect   uint8 // as in Client
	SuspectAt int64

	_ [reserve]byte
}
