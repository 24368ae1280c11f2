// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/packet"
)

// Numbers of linux/netfilter/nfnetlink_queue.h.
const (
	msgPacket       = unix.NFNL_SUBSYS_QUEUE << 8
	msgVerdict      = unix.NFNL_SUBSYS_QUEUE<<8 | 1
	msgConfig       = unix.NFNL_SUBSYS_QUEUE<<8 | 2
	msgVerdictBatch = unix.NFNL_SUBSYS_QUEUE<<8 | 3

	attrPacketHdr  = 1
	attrVerdictHdr = 2
	attrMark       = 3
	attrInDev      = 5
	attrPayload    = 10
	attrCapLen     = 13
	attrSkbInfo    = 14

	cfgCmd    = 1
	cfgParams = 2
	cfgMaxLen = 3
	cfgMask   = 4
	cfgFlags  = 5

	cmdBind   = 1
	cmdPFBind = 3

	copyPacket = 2

	flagGSO = 1 << 2 // NFQA_CFG_F_GSO; NFQA_CFG_F_FAIL_OPEN is never set

	skbCsumNotReady    = 1 << 0
	skbGSO             = 1 << 1
	skbCsumNotVerified = 1 << 2

	hookForward = 2 // NF_INET_FORWARD

	nfDrop   = 0
	nfAccept = 1
	nfRepeat = 4 // the hook that queued the packet runs again
)

// be and ne are the byte orders of nfnetlink's values and of netlink's headers.
var (
	be = binary.BigEndian
	ne = binary.NativeEndian
)

// checksumState reads the kernel's flags for a packet queued at hook.
//
// The kernel says "not ready" for CHECKSUM_PARTIAL: packets of this host or of
// a virtual link, and those merged by GRO, which has checked them. It says "not
// verified" when neither hardware nor software has checked the sum, but only at
// prerouting, input and forward: elsewhere silence means nothing.
func checksumState(flags uint32, hook uint8) packet.ChecksumState {
	switch {
	case flags&skbCsumNotReady != 0:
		return packet.ChecksumPartial
	case flags&skbCsumNotVerified != 0, hook > hookForward:
		return packet.ChecksumUnknown
	}
	return packet.ChecksumVerified
}

// configMessage makes a configuration request for a queue. It asks for an
// acknowledgment.
func configMessage(queue uint16, attrs []netlink.Attribute) (netlink.Message, error) {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return netlink.Message{}, err
	}
	// struct nfgenmsg: family, version, resource id in network order.
	data := append([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(queue >> 8), byte(queue)}, b...)
	return netlink.Message{
		Header: netlink.Header{Type: msgConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   data,
	}, nil
}

// probe asks for something that every kernel with queues grants to everybody
// who may configure them (binding a protocol family, without effect for many
// years). So EPERM here means lack of privileges, and after it EPERM means that
// another program holds the queue.
func probe(c *netlink.Conn, queue uint16) error {
	m, err := configMessage(0, []netlink.Attribute{{Type: cfgCmd, Data: []byte{cmdPFBind, 0, 0, unix.AF_INET}}})
	if err == nil {
		_, err = c.Execute(m)
	}
	if err != nil {
		return openError(queue, "ask the kernel for packet queues", err)
	}
	return nil
}

// bindMessage binds the queue and configures it in one step, so that no packet
// is queued under half a configuration.
func bindMessage(cfg Config) (netlink.Message, error) {
	bind := netlink.Attribute{Type: cfgCmd, Data: []byte{cmdBind, 0, 0, unix.AF_UNSPEC}}
	return configMessage(cfg.Queue, append([]netlink.Attribute{bind}, paramAttrs(cfg)...))
}

// paramsMessage configures a queue that this socket holds already. Nobody waits
// for an acknowledgment, which would have to be told from packets.
func paramsMessage(cfg Config) (netlink.Message, error) {
	m, err := configMessage(cfg.Queue, paramAttrs(cfg))
	m.Header.Flags = netlink.Request
	m.Header.Sequence = batchSeq
	m.Header.Length = uint32(nlHeader + len(m.Data)) // attributes are padded
	return m, err
}

func paramAttrs(cfg Config) []netlink.Attribute {
	var flags uint32
	if cfg.GSO {
		flags |= flagGSO
	}
	u32 := func(v uint32) []byte { return be.AppendUint32(nil, v) }
	return []netlink.Attribute{
		{Type: cfgParams, Data: append(u32(cfg.CopyRange), copyPacket)},
		{Type: cfgMaxLen, Data: u32(cfg.Length)},
		{Type: cfgFlags, Data: u32(flags)},
		{Type: cfgMask, Data: u32(flagGSO | 1)}, // 1: fail-open is cleared
	}
}

// ackGate returns a socket filter that lets only netlink errors and
// acknowledgments pass. With rules in place packets flow as soon as a queue is
// bound, and one that slips in before the acknowledgment would be taken for a
// wrong answer. Packets that the filter swallows stay in the kernel's queue
// without a verdict; whoever removes the filter drops them by number when it
// has seen the first later one.
func ackGate() ([]bpf.RawInstruction, error) {
	var typ [2]byte
	ne.PutUint16(typ[:], unix.NLMSG_ERROR)
	return bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 2}, // nlmsg_type, loaded in network order
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(be.Uint16(typ[:])), SkipFalse: 1},
		bpf.RetConstant{Val: 0xffffffff},
		bpf.RetConstant{Val: 0},
	})
}

// tally holds the counters behind Stats. The queue adds once per batch.
type tally struct {
	received, receivedBytes, batches, gso, truncated atomic.Uint64
	dropped, accepted, rewritten                     atomic.Uint64
	refused, unanswered, malformed, requeued         atomic.Uint64
	verdictErrors, sendErrors                        atomic.Uint64
	receiveErrors, noBuffers, wakes                  atomic.Uint64
}

func (t *tally) stats() Stats {
	return Stats{
		Received: t.received.Load(), ReceivedBytes: t.receivedBytes.Load(), Batches: t.batches.Load(),
		GSO: t.gso.Load(), Truncated: t.truncated.Load(),
		Dropped: t.dropped.Load(), Accepted: t.accepted.Load(), Rewritten: t.rewritten.Load(),
		Refused: t.refused.Load(), Requeued: t.requeued.Load(), Unanswered: t.unanswered.Load(), Malformed: t.malformed.Load(),
		VerdictErrors: t.verdictErrors.Load(), SendErrors: t.sendErrors.Load(),
		ReceiveErrors: t.receiveErrors.Load(), NoBuffers: t.noBuffers.Load(), Wakes: t.wakes.Load(),
	}
}

// refusal tells whether a rewritten packet cannot go back to the kernel.
func refusal(p *Packet) bool {
	return p.Truncated || len(p.Data) == 0 || len(p.Data) > MaxPacket
}
