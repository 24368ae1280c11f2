// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"sync/atomic"

	"github.com/weirgate/weir/module/http1"
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
	ReasonConnectionLimit
	ReasonClientLimit
	ReasonEmbryosFull
	ReasonTombsFull
	ReasonKeptFull
	ReasonHeldFull
	ReasonResetLimit
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
	ReasonAskFull
	ReasonAskBusy
	ReasonPreopened
	ReasonICMPTranslated
	ReasonICMPForeign
	ReasonICMPIgnored
	ReasonACKLoop
	ReasonReincarnated
	// an operator's doing
	ReasonKilled
	ReasonVIPGone
	// what a dead predecessor left cannot go on
	ReasonTakeover
	ReasonQuarantined
	// framing: what became of exchanges that are not plain
	ReasonRouteUnsafe
	ReasonForwardedFields
	ReasonBodyRefused
	ReasonSlowBody
	ReasonExpectHeld
	ReasonUnaskedSwitch
	ReasonTunnel
	ReasonTunnelSilent
	ReasonPrivate
	ReasonPrivateReused
	ReasonFramingKept
	ReasonStuckInDoubt
	// own answers, by status
	ReasonAnswer400
	ReasonAnswer404
	ReasonAnswer408
	ReasonAnswer414
	ReasonAnswer431
	ReasonAnswer501
	ReasonAnswer502
	ReasonAnswer503
	ReasonAnswer504
	ReasonAnswer505
	ReasonAnswerRedirect
	ReasonAnswerOther
	// requests refused by the scanner, one for each http1.Reason
	reasonRefused
)

// refusedRoom is how many reasons of package http1 there may be.
const refusedRoom = 96

const reasonCount = reasonRefused + refusedRoom

// refused is the counter of requests that were refused for that reason.
func refused(why http1.Reason) Reason { return reasonRefused + Reason(why) }

func init() {
	for i := range http1.Reasons() {
		reasonNames[reasonRefused+Reason(i)] = "refused-" + http1.Reason(i).String()
	}
}

// Refusals are the reasons that say what the engine refused, answered or ended
// by itself, and why: what an operator wants to hear of.
func Refusals() []Reason {
	out := []Reason{
		ReasonRouteUnsafe, ReasonForwardedFields, ReasonBodyRefused, ReasonSlowBody, ReasonHeadTimeout,
		ReasonUnaskedSwitch, ReasonFramingKept, ReasonStuckInDoubt,
	}
	for r := ReasonAnswer400; r < reasonRefused; r++ {
		out = append(out, r)
	}
	for i := 1; i < http1.Reasons(); i++ {
		out = append(out, refused(http1.Reason(i)))
	}
	return out
}

// answered is the counter of own answers with that status.
func answered(status int) Reason {
	switch status {
	case 400:
		return ReasonAnswer400
	case 404:
		return ReasonAnswer404
	case 408:
		return ReasonAnswer408
	case 414:
		return ReasonAnswer414
	case 431:
		return ReasonAnswer431
	case 501:
		return ReasonAnswer501
	case 502:
		return ReasonAnswer502
	case 503:
		return ReasonAnswer503
	case 504:
		return ReasonAnswer504
	case 505:
		return ReasonAnswer505
	}
	if status/100 == 3 {
		return ReasonAnswerRedirect
	}
	return ReasonAnswerOther
}

var reasonNames = [reasonCount]string{
	"none",
	"malformed", "fragment", "bad-checksum", "truncated-copy", "unknown-client", "unknown-server", "bad-cookie",
	"tombstone", "table-full", "connection-limit", "client-limit", "embryos-full", "tombstones-full", "kept-full", "held-full", "reset-limit", "ack-beyond", "out-of-window", "blind-reset", "beyond-frontier", "beyond-window", "old-epoch",
	"stateless-reset", "stateless-fin", "challenge-ack", "early-ack", "own-answer",
	"client-fin", "client-reset", "client-idle", "client-silent", "head-timeout", "aborted-request", "served",
	"truncated-response", "bad-response", "stopped",
	"server-close", "server-fin", "server-reset", "server-silent", "connect-refused", "connect-timeout", "extra-bytes",
	"idle-bytes", "isolated", "early-response", "ack-causality", "idle-timeout", "max-requests", "max-age", "max-idle",
	"drain-limit", "server-gone",
	"redispatch-proof", "redispatch-idempotent", "redispatch-connect",
	"accepted", "retransmitted", "drained", "waited", "waiting-full", "wait-timeout", "no-port", "surge", "ask-full", "ask-busy", "preopened",
	"icmp-translated", "icmp-foreign", "icmp-ignored", "ack-loop", "reincarnated",
	"killed", "vip-gone", "takeover", "quarantined",
	"route-unsafe", "forwarded-fields", "body-refused", "slow-body", "expect-held", "unasked-switch",
	"tunnel", "tunnel-silent", "private", "private-reused", "framing-kept", "stuck-in-doubt",
	"answer-400", "answer-404", "answer-408", "answer-414", "answer-431", "answer-501", "answer-502", "answer-503",
	"answer-504", "answer-505", "answer-redirect", "answer-other",
}

// String returns the reason's name as counters and logs show it.
func (r Reason) String() string {
	if int(r) < len(reasonNames) && reasonNames[r] != "" {
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

// Add adds what a predecessor counted.
func (c *Counters) Add(r Reason, n uint64) { c[r].Add(n) }

// Get returns one counter.
func (c *Counters) Get(r Reason) uint64 { return c[r].Load() }

func malformed(p packet.Problem) Reason {
	if p == packet.Fragment {
		return ReasonFragment
	}
	return ReasonMalformed
}
