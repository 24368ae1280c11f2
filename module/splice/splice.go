// SPDX-License-Identifier: Apache-2.0

// Package splice holds what makes one client connection and one pooled server
// connection look like a single one: the equations of WO 00/28433 ("connection
// multiplexing", FIG 4 steps 404 and 406), the overlay of inserted bytes, the
// window arithmetic, and the flat records in which the two connections are
// remembered.
//
// It must not do I/O, read a clock, allocate or keep pointers: records are
// plain memory that may be mapped, copied and taken over by another process.
package splice

import "github.com/weirgate/weir/module/packet"

// Window scales that the interface unit announces (RFC 7323 section 2.2). They
// are fixed, so that a cookie need not carry them. A shift of 7 keeps windows
// of 128 bytes and more from being rounded to zero.
const (
	ScaleToServer = 7
	ScaleToClient = 7
)

// NoScale marks a peer that did not offer the window scale option: windows in
// both directions are then unscaled (RFC 7323 section 2.2).
const NoScale = 255

// Epoch is one request and its response: the starting numbers of the patent's
// equations. "Inflow" and "Outflow" swap their roles with the direction.
//
// The zero value is no epoch; the engine writes a new one at every bind.
type Epoch struct {
	ReqBase  packet.Seq // client's number of the request's first byte
	SndBase  packet.Seq // our number of that byte toward the server
	RcvBase  packet.Seq // server's number of the response's first byte
	RespBase packet.Seq // our number of that byte toward the client
	InsOff   uint32     // place of the insertion, in request bytes from ReqBase
	InsLen   uint32     // "Bytes Added": length of the insertion, 0 = none
}

// offset is the signed distance from base, so that numbers a little below base
// (old segments) stay below it.
func offset(s, base packet.Seq) int32 { return int32(uint32(s) - uint32(base)) }

// SeqToServer maps a client's sequence number to the server connection:
//
//	out.seq = in.seq - in.start + out.start + out.bytesAdded
//
// The bytes added count for everything from the insertion on (the patent: they
// do "not affect the sequence numbers in the GET packet", only those of
// subsequent packets).
func (e *Epoch) SeqToServer(s packet.Seq) packet.Seq {
	off := offset(s, e.ReqBase)
	out := uint32(e.SndBase) + uint32(off)
	if e.InsLen != 0 && off >= int32(e.InsOff) {
		out += e.InsLen
	}
	return packet.Seq(out)
}

// AckToServer maps a client's acknowledgment number:
//
//	out.ack = in.ack - in.ackStart + out.ackStart
//
// No bytes are ever added toward clients.
func (e *Epoch) AckToServer(a packet.Seq) packet.Seq {
	return packet.Seq(uint32(a) - uint32(e.RespBase) + uint32(e.RcvBase))
}

// SeqToClient maps a server's sequence number to the client connection.
func (e *Epoch) SeqToClient(s packet.Seq) packet.Seq {
	return packet.Seq(uint32(s) - uint32(e.RcvBase) + uint32(e.RespBase))
}

// AckToClient maps a server's acknowledgment number (or an edge of a SACK
// block of the server's) to the client connection:
//
//	out.ack = in.ack - in.ackStart + out.ackStart - in.bytesAdded
//
// A number inside the insertion maps to its start: the client has no such
// byte.
func (e *Epoch) AckToClient(a packet.Seq) packet.Seq {
	off := offset(a, e.SndBase)
	if e.InsLen != 0 && off > int32(e.InsOff) {
		if off <= int32(e.InsOff+e.InsLen) {
			off = int32(e.InsOff)
		} else {
			off -= int32(e.InsLen)
		}
	}
	return packet.Seq(uint32(e.ReqBase) + uint32(off))
}

// Fold turns a passed insertion into a part of the constant difference. The
// engine calls it once the server has acknowledged beyond the insertion: from
// then on the comparison "before or after the insertion" is not needed and
// stays decidable for requests of more than 2 GiB. Client bytes before the
// insertion are old by then; that they map to numbers InsLen too high is
// harmless, because those are acknowledged too.
func (e *Epoch) Fold() {
	e.SndBase = packet.Seq(uint32(e.SndBase) + e.InsLen)
	e.InsOff, e.InsLen = 0, 0
}

// TrueWindow is the window in bytes that a header field means, given the shift
// which its sender announced (RFC 7323 section 2.2).
func TrueWindow(field uint16, shift uint8) uint32 {
	if shift == NoScale {
		return uint32(field)
	}
	return uint32(field) << (shift & 15)
}

// WindowField is the header field for a true window, given the shift that we
// announced to the receiver: rounded down, clamped to 65535; zero stays zero.
func WindowField(window uint32, shift uint8) uint16 {
	if shift != NoScale {
		window >>= shift & 15
	}
	return uint16(min(window, 0xffff))
}
