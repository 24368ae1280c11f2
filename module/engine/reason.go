// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"sync/atomic"

	"github.com/weirgate/weir/module/packet"
)

// Reason names why something was dropped, reset, refused, redispatched or
// closed: one counter, one log attribute, one column in the CLI.
type Reason uint8

// The reasons. The text of each is in reasonNames.
const (
	ReasonNone Reason = iota
	// packets dropped
	ReasonMalformed
	ReasonFragment
	ReasonBadChecksum
	ReasonTruncatedCopy
	ReasonUnknownClient
	ReasonUnknownServer
	ReasonBadCookie
	ReasonTombstone
	ReasonTableFull
	ReasonAckBeyond
	ReasonOutOfWindow
	ReasonBlindReset
	ReasonBeyondFrontier
	ReasonBeyondWindow
	ReasonOldEpoch
	// resets sent and answers given
	ReasonStatelessReset
	ReasonStatelessFIN
	ReasonChallengeACK
	ReasonEarlyACK
	ReasonOwnAnswer
	// client connections closed
	ReasonClientFIN
	ReasonClientReset
	ReasonClientIdle
	ReasonClientSilent
	ReasonHeadTimeout
	ReasonAbortedRequest
	ReasonServed
	ReasonTruncatedResponse
	ReasonBadResponse
	ReasonStopped
	// server connections not reused
	ReasonServerClose
	ReasonServerFIN
	ReasonServerReset
	ReasonServerSilent
	ReasonConnectRefused
	ReasonConnectTimeout
	ReasonExtraBytes
	ReasonIdleBytes
	ReasonIsolated
	ReasonEarlyResponse
	ReasonAckCausality
	ReasonIdleTimeout
	ReasonMaxRequests
	ReasonMaxAge
	ReasonMaxIdle
	ReasonDrainLimit
	ReasonServerGone
	// redispatches, by evidence
	ReasonRedispatchProof
	ReasonRedispatchIdempotent
	ReasonRedispatchConnect
	// other happenings
	ReasonAccepted
	ReasonRetransmitted
	ReasonDrained
	ReasonWaited
	ReasonWaitingFull
	ReasonWaitTimeout
	ReasonNoPort
	ReasonSurge
	ReasonPreopened
	ReasonICMPTranslated
	ReasonICMPForeign
	ReasonICMPIgnored
	ReasonACKLoop
	ReasonReincarnated
	// an operator's doing
	ReasonKilled
	ReasonVIPGone
	reasonCount
)

var reasonNames = [reasonCount]string{
	"none",
	"malformed", "fragment", "bad-checksum", "truncated-copy", "unknown-client", "unknown-server", "bad-cookie",
	"tombstone", "table-full", "ack-beyond", "out-of-window", "blind-reset", "beyond-frontier", "beyond-window", "old-epoch",
	"stateless-reset", "stateless-fin", "challenge-ack", "early-ack", "own-answer",
	"client-fin", "client-reset", "client-idle", "client-silent", "head-timeout", "aborted-request", "served",
	"truncated-response", "bad-response", "stopped",
	"server-close", "server-fin", "server-reset", "server-silent", "connect-refused", "connect-timeout", "extra-bytes",
	"idle-bytes", "isolated", "early-response", "ack-causality", "idle-timeout", "max-requests", "max-age", "max-idle",
	"drain-limit", "server-gone",
	"redispatch-proof", "redispatch-idempotent", "redispatch-connect",
	"accepted", "retransmitted", "drained", "waited", "waiting-full", "wait-timeout", "no-port", "surge", "preopened",
	"icmp-translated", "icmp-foreign", "icmp-ignored", "ack-loop", "reincarnated",
	"killed", "vip-gone",
}

// String returns the reason's name as counters and logs show it.
func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return "unknown"
}

// Reasons is the number of reasons.
const Reasons = int(reasonCount)

// Counters count happenings by reason. The engine's thread writes, anybody may
// read.
type Counters [reasonCount]atomic.Uint64

func (c *Counters) add(r Reason) { c[r].Add(1) }

// Get returns one counter.
func (c *Counters) Get(r Reason) uint64 { return c[r].Load() }

func malformed(p packet.Problem) Reason {
	if p == packet.Fragment {
		return ReasonFragment
	}
	return ReasonMalformed
}
