// SPDX-License-Identifier: Apache-2.0

// Package bare translates connections and does nothing else: no heads are
// read, no server is chosen, no connection is kept. It shows what the ways into
// the kernel leave to a program that does more: Queue is the same NFQUEUE loop
// that Weir has, with a step of a few dozen instructions; TC is a program at
// the interfaces (tcx), which is where established splices could be translated.
//
// A connection to the VIP becomes one to the server from a port of its own,
// with both sequence spaces shifted, as a splice has them. It is a measure
// for the benchmarks: a connection that was seen once stays in the table, IPv4
// without IP options is all it knows, and a router must never run it.
package bare

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/packet"
)

// Config says who is translated into whom: IPv4 addresses.
type Config struct {
	VIP, Server netip.AddrPort
	SNIP        netip.Addr
}

const (
	firstPort = 10240
	ports     = 16384 // a power of two

	queueNum   = 22271
	tableName  = "bare"
	dataOffset = 1 << 28 // how far apart the numbers of two connections are
)

// strand is what becomes of one direction of a connection.
type strand struct {
	to       packet.Tuple
	seq, ack packet.Delta
}

// table finds the strand of a packet.
type table struct {
	cfg     Config
	strands map[packet.Tuple]strand
	opened  uint32
}

// find returns the strand of a segment; a SYN to the VIP makes one.
func (t *table) find(p *packet.TCP) (strand, bool) {
	from := p.Tuple()
	s, ok := t.strands[from]
	if ok || from.Dst != packet.EndpointFrom(t.cfg.VIP) || p.Flags()&(packet.SYN|packet.ACK) != packet.SYN {
		return s, ok
	}
	t.opened++
	s = strand{
		to: packet.Tuple{
			Src: packet.EndpointFrom(netip.AddrPortFrom(t.cfg.SNIP, uint16(firstPort+t.opened%ports))),
			Dst: packet.EndpointFrom(t.cfg.Server),
		},
		seq: packet.Delta(t.opened * dataOffset), ack: packet.Delta(t.opened * (dataOffset + 1)),
	}
	t.strands[from] = s
	t.strands[s.to.Reverse()] = strand{to: from.Reverse(), seq: -s.ack, ack: -s.seq}
	return s, true
}

// turn sets a packet's verdict. What belongs to no connection goes its way.
func (t *table) turn(p *divert.Packet) {
	p.Verdict = divert.Accept
	seg, problem := packet.ParseTCP(p.Data)
	if problem != packet.OK || p.Truncated {
		return
	}
	s, ok := t.find(&seg)
	if !ok {
		return
	}
	r := packet.Rewrite{
		Src: s.to.Src, Dst: s.to.Dst, Seq: seg.Seq().Shift(s.seq), Ack: seg.Ack(), Window: seg.Window(), Flags: seg.Flags(),
	}
	if r.Flags.Has(packet.ACK) {
		r.Ack = r.Ack.Shift(s.ack)
	}
	seg.Rewrite(&r, p.Checksum)
	if p.Checksum == packet.ChecksumPartial && !p.GSO {
		seg.FillChecksum()
	}
	p.Verdict = divert.Rewritten
}

// Queue translates in the network namespace of the calling thread what comes
// through an NFQUEUE, until the context ends. It calls ready when it does.
func Queue(ctx context.Context, cfg Config, ready func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	q, err := divert.OpenBatched(divert.Config{Queue: queueNum, GSO: true, Linger: divert.DefaultLinger})
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, q.Wake)
	defer stop()
	remove, err := divertAll()
	if err != nil {
		return errors.Join(err, q.Close())
	}
	ready()
	t := &table{cfg: cfg, strands: map[packet.Tuple]strand{}}
	batch := make([]divert.Packet, divert.DefaultBatch)
	for ctx.Err() == nil && err == nil {
		var n int
		if n, err = q.Receive(batch, time.Second); err != nil {
			break
		}
		for i := range batch[:n] {
			t.turn(&batch[i])
		}
		err = q.Send(batch[:n])
	}
	return errors.Join(err, remove(), q.Close())
}

// divertAll queues all TCP that arrives, as early as Weir does, by the queue
// expression or, where the kernel lacks that, by the xtables target.
func divertAll() (remove func() error, err error) {
	info := make(xt.Unknown, 8) // struct xt_NFQ_info_v1: number and count
	binary.NativeEndian.PutUint16(info, queueNum)
	binary.NativeEndian.PutUint16(info[2:], 1)
	for _, queue := range []expr.Any{&expr.Queue{Num: queueNum, Total: 1}, &expr.Target{Name: "NFQUEUE", Rev: 1, Info: &info}} {
		if remove, err = rule(queue); err == nil {
			return remove, nil
		}
	}
	return nil, fmt.Errorf("a rule that queues: %w", err)
}

func rule(queue expr.Any) (remove func() error, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: tableName})
	chain := c.AddChain(&nftables.Chain{
		Name: "divert", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting,
		Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityRaw - 1),
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		queue,
	}})
	if err := c.Flush(); err != nil {
		return nil, err
	}
	return func() error {
		c.DelTable(t)
		return c.Flush()
	}, nil
}
