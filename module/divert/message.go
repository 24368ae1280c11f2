// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"fmt"
	"iter"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Layout of the messages. Attributes and messages begin at multiples of four.
const (
	nlHeader  = 16           // struct nlmsghdr
	nfHeader  = nlHeader + 4 // and struct nfgenmsg
	attrHdr   = 4            // struct nlattr
	verdictHd = 12           // NFQA_VERDICT_HDR with its header
	markLen   = 8            // NFQA_MARK with its header

	// verdictLen is a message with a verdict alone, markedLen one with a mark,
	// rewriteLen one with a mark and the header of the payload behind it.
	verdictLen = nfHeader + verdictHd
	markedLen  = verdictLen + markLen
	rewriteLen = markedLen + attrHdr

	attrTypeMask = 0x3fff // the upper two bits are flags
)

// A verdict must fit in front of the shortest message's payload.
var _ = [1]struct{}{}[max(0, rewriteLen-slotLead)]

type messageKind uint8

const (
	kindMalformed messageKind = iota
	kindPacket
	kindVerdictError // the kernel refused a verdict
	kindNothing      // nothing to act upon
)

// message is what a packet message says.
type message struct {
	id, mark, inIf, flags uint32
	payload, length       int // where the packet is
	hook                  uint8
	truncated             bool
}

// parseMessage reads one datagram, which holds one message. cut tells that the
// datagram did not fit. A malformed message has its id set if that is known.
func parseMessage(b []byte, cut bool) (m message, kind messageKind) {
	if len(b) < nlHeader {
		return m, kindMalformed
	}
	size := int(ne.Uint32(b))
	switch ne.Uint16(b[4:]) {
	case msgPacket:
	case unix.NLMSG_ERROR:
		switch {
		case len(b) < nlHeader+4:
			return m, kindMalformed
		case ne.Uint32(b[nlHeader:]) == 0, ne.Uint32(b[8:]) == batchSeq:
			// An acknowledgment, or a batch that found nothing to drop.
			return m, kindNothing
		}
		return m, kindVerdictError
	default:
		return m, kindNothing
	}
	if size < nfHeader || (size > len(b) && !cut) {
		return m, kindMalformed
	}
	b = b[:min(size, len(b))]
	found := false
	for at := nfHeader; at+attrHdr <= len(b); {
		n := int(ne.Uint16(b[at:]))
		typ := ne.Uint16(b[at+2:]) & attrTypeMask
		if n < attrHdr || at+n > len(b) {
			return m, kindMalformed
		}
		v := b[at+attrHdr : at+n]
		switch {
		case typ == attrPayload:
			m.payload, m.length, found = at+attrHdr, len(v), len(v) > 0
		case typ == attrPacketHdr && len(v) >= 7:
			m.id, m.hook = be.Uint32(v), v[6]
		case typ == attrMark && len(v) >= 4:
			m.mark = be.Uint32(v)
		case typ == attrInDev && len(v) >= 4:
			m.inIf = be.Uint32(v)
		case typ == attrSkbInfo && len(v) >= 4:
			m.flags = be.Uint32(v)
		case typ == attrCapLen:
			m.truncated = true
		}
		at += (n + 3) &^ 3
	}
	if !found || m.id == 0 || cut {
		return m, kindMalformed
	}
	return m, kindPacket
}

// putVerdict writes a message with a verdict to b and returns its length,
// verdictLen. The sequence number comes back in an error report.
func putVerdict(b []byte, typ uint16, queue uint16, seq, id, verdict uint32) int {
	_ = b[verdictLen-1]
	ne.PutUint32(b[0:], verdictLen)
	ne.PutUint16(b[4:], typ)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST)
	ne.PutUint32(b[8:], seq)
	ne.PutUint32(b[12:], 0) // port id: the kernel knows the sender
	b[16], b[17] = unix.AF_UNSPEC, unix.NFNETLINK_V0
	be.PutUint16(b[18:], queue)
	ne.PutUint16(b[20:], verdictHd)
	ne.PutUint16(b[22:], attrVerdictHdr)
	be.PutUint32(b[24:], verdict)
	be.PutUint32(b[28:], id)
	return verdictLen
}

// putMark adds the mark to a verdict and returns the new length, markedLen.
func putMark(b []byte, mark uint32) int {
	_ = b[markedLen-1]
	ne.PutUint32(b[0:], markedLen)
	ne.PutUint16(b[verdictLen:], markLen)
	ne.PutUint16(b[verdictLen+2:], attrMark)
	be.PutUint32(b[verdictLen+4:], mark)
	return markedLen
}

// putPayload announces n bytes of packet behind a verdict with mark and returns
// the message's length, with the padding that lets another one follow.
func putPayload(b []byte, n int) int {
	_ = b[rewriteLen-1]
	total := (rewriteLen + n + 3) &^ 3
	ne.PutUint32(b[0:], uint32(total))
	ne.PutUint16(b[markedLen:], uint16(attrHdr+n))
	ne.PutUint16(b[markedLen+2:], attrPayload)
	return total
}

// configSocket lets mdlayher/netlink speak over a socket that stays ours. It
// is used while a queue is opened, for requests that the kernel acknowledges.
type configSocket struct{ fd int }

// configTimeout bounds the wait for an acknowledgment, which the kernel sends
// before the request's system call returns.
const configTimeout = 5 * time.Second

func (s *configSocket) Close() error { return nil }

func (s *configSocket) Send(m netlink.Message) error {
	b, err := m.MarshalBinary()
	if err != nil {
		return err
	}
	return unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

func (s *configSocket) SendMessages(ms []netlink.Message) error {
	for _, m := range ms {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	return nil
}

func (s *configSocket) ReceiveIter() iter.Seq2[netlink.Message, error] {
	return func(yield func(netlink.Message, error) bool) {
		ms, err := s.Receive()
		if err != nil {
			yield(netlink.Message{}, err)
			return
		}
		for _, m := range ms {
			if !yield(m, nil) {
				return
			}
		}
	}
}

func (s *configSocket) Receive() ([]netlink.Message, error) {
	b := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(s.fd, b, 0)
		switch err {
		case nil:
			var m netlink.Message
			if err := m.UnmarshalBinary(b[:(n+3)&^3]); err != nil {
				return nil, err
			}
			return []netlink.Message{m}, nil
		case unix.EINTR:
		case unix.EAGAIN:
			fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, int(configTimeout/time.Millisecond))
			if err != nil && err != unix.EINTR {
				return nil, err
			}
			if n == 0 {
				return nil, fmt.Errorf("no answer of the kernel within %v", configTimeout)
			}
		default:
			return nil, err
		}
	}
}
