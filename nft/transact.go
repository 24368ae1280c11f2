// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Errors of everything that talks to the kernel; match with errors.Is.
var (
	// ErrPermission: this process may not change the firewall.
	ErrPermission = errors.New("no permission to change the firewall: run as root or with the capability CAP_NET_ADMIN in this network namespace")

	// ErrNoNftables: the kernel has no nftables.
	ErrNoNftables = errors.New("the kernel has no nftables: load the module nf_tables")

	// ErrOwned: another living process owns the table.
	ErrOwned = errors.New("the table is owned by another process")
)

// errOverrun: acknowledgments were lost, so the kernel may or may not have
// committed. Every batch of ours may be sent again, and is.
var errOverrun = errors.New("the kernel's answers were lost")

// ackTimeout is how long to wait for an answer. The kernel answers a batch
// before sendmsg returns, so only a kernel bug or a lost answer makes us wait;
// loading a module for the batch happens within sendmsg too.
const ackTimeout = 5 * time.Second

// A BatchError says which step of a transaction the kernel refused, and in
// its words why. Nothing of the transaction was done.
type BatchError struct {
	What string        // the step, in nft's words
	Text string        // the kernel's explanation, often empty
	Err  syscall.Errno // the kernel's error number
}

func (e *BatchError) Error() string {
	s := fmt.Sprintf("nft: %s: %v", e.What, e.Err)
	if e.Text != "" {
		s += " (" + e.Text + ")"
	}
	return s
}

func (e *BatchError) Unwrap() error { return e.Err }

// conn is a netlink socket to nftables. As the owner of a table it has to live
// as long as the table should be guarded; otherwise one per transaction will
// do. It is bound to the network namespace of the thread that opened it, and
// not safe for concurrent use.
type conn struct {
	nl *netlink.Conn
}

func dial() (*conn, error) {
	c, err := dialReader()
	if err != nil {
		return nil, err
	}
	// An acknowledgment need not carry the request back, but should carry the
	// kernel's explanation. Both are refinements: kernels without go on.
	_ = c.nl.SetOption(netlink.CapAcknowledge, true)
	_ = c.nl.SetOption(netlink.ExtendedAcknowledge, true)
	return c, nil
}

// dialReader is dial for one who only reads: netlink.Conn, which parses the
// answers there, cannot parse an error that is both cut and explained.
func dialReader() (*conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT):
		return nil, fmt.Errorf("nft: %w", ErrNoNftables)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("nft: %w", ErrPermission)
	case err != nil:
		return nil, fmt.Errorf("nft: opening a netlink socket: %w", err)
	}
	return &conn{nl: nl}, nil
}

func (c *conn) close() error { return c.nl.Close() }

// send carries out one batch, all of it or nothing. The error is a
// *BatchError for the first step that was refused, or wraps ErrPermission.
func (c *conn) send(b *batch) error {
	res, err := c.talk(b, true)
	if errors.Is(err, errOverrun) {
		res, err = c.talk(b, true)
	}
	if err != nil {
		return err
	}
	for _, r := range res {
		if r != nil {
			return r
		}
	}
	return nil
}

// try lets the kernel check a batch without doing it: a batch without an end
// is validated and then given up. One result per message, nil where the kernel
// would have done it.
func (c *conn) try(b *batch) ([]*BatchError, error) { return c.talk(b, false) }

func (c *conn) talk(b *batch, commit bool) ([]*BatchError, error) {
	generic := func(subsystem uint16) []byte { // struct nfgenmsg
		return []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(subsystem >> 8), byte(subsystem)}
	}
	msgs := make([]netlink.Message, 0, len(b.messages)+2)
	msgs = append(msgs, netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request},
		Data:   generic(unix.NFNL_SUBSYS_NFTABLES),
	})
	msgs = append(msgs, b.messages...)
	if commit {
		msgs = append(msgs, netlink.Message{
			Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request},
			Data:   generic(unix.NFNL_SUBSYS_NFTABLES),
		})
	}

	// The kernel takes a batch in one piece only, and puts one acknowledgment
	// per message into our receive buffer before sendmsg returns. An
	// acknowledgment is charged with less than 1 KiB.
	size := 0
	for i := range msgs {
		size += len(msgs[i].Data) + 20
	}
	if err := c.nl.SetWriteBuffer(2*size + 1<<16); err != nil {
		return nil, fmt.Errorf("nft: netlink send buffer: %w", err)
	}
	if err := c.nl.SetReadBuffer(2048*len(msgs) + 1<<20); err != nil {
		return nil, fmt.Errorf("nft: netlink receive buffer: %w", err)
	}

	sent, err := c.nl.SendMessages(msgs)
	if err != nil {
		return nil, fmt.Errorf("nft: sending %d messages of %d bytes: %w", len(msgs), size, err)
	}
	index := make(map[uint32]int, len(b.messages)) // sequence number to step
	for i := range b.messages {
		index[sent[1+i].Header.Sequence] = i
	}
	return c.collect(b, sent[0].Header.Sequence, index)
}

// collect reads one answer per step, in whatever order, and no more.
func (c *conn) collect(b *batch, begin uint32, index map[uint32]int) ([]*BatchError, error) {
	res := make([]*BatchError, len(b.messages))
	buf := make([]byte, 1<<16)
	for len(index) > 0 {
		n, err := c.receive(buf)
		if err != nil {
			if errors.Is(err, unix.ENOBUFS) || errors.Is(err, os.ErrDeadlineExceeded) {
				return nil, fmt.Errorf("nft: %w (%d of %d missing)", errOverrun, len(index), len(b.messages))
			}
			return nil, fmt.Errorf("nft: receiving the kernel's answer: %w", err)
		}
		for _, a := range acks(buf[:n]) {
			if a.seq == begin && a.errno != 0 {
				// The batch as a whole was refused and nothing else comes.
				if a.errno == unix.EPERM {
					return nil, fmt.Errorf("nft: %w", ErrPermission)
				}
				if a.errno == unix.EOPNOTSUPP || a.errno == unix.EINVAL {
					return nil, fmt.Errorf("nft: %w (%v)", ErrNoNftables, a.errno)
				}
				return nil, &BatchError{What: "transaction", Text: a.text, Err: a.errno}
			}
			i, ok := index[a.seq]
			if !ok {
				continue // an answer to something earlier
			}
			delete(index, a.seq)
			if a.errno != 0 {
				res[i] = &BatchError{What: b.what[i], Text: a.text, Err: a.errno}
			}
		}
	}
	return res, nil
}

// receive reads one datagram. netlink.Conn.Receive would turn an error into a
// Go error without the sequence number, and so without the step.
func (c *conn) receive(buf []byte) (int, error) {
	if err := c.nl.SetReadDeadline(time.Now().Add(ackTimeout)); err != nil {
		return 0, err
	}
	rc, err := c.nl.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var rerr error
	err = rc.Read(func(fd uintptr) bool {
		for {
			n, _, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			if rerr != unix.EINTR {
				return rerr != unix.EAGAIN
			}
		}
	})
	if err != nil {
		return 0, err
	}
	return n, rerr
}

type ack struct {
	seq   uint32
	errno syscall.Errno
	text  string
}

// acks parses the NLMSG_ERROR messages of a datagram (struct nlmsghdr, int
// errno, the request's nlmsghdr, then attributes) and skips all others.
func acks(b []byte) []ack {
	const (
		header    = 16
		flagCap   = 0x100 // NLM_F_CAPPED: the request is cut to its header
		flagTLVs  = 0x200 // NLM_F_ACK_TLVS
		attrMsg   = 1     // NLMSGERR_ATTR_MSG
		typeMask  = 0x3fff
		alignMask = 3
	)
	ne := binary.NativeEndian
	var out []ack
	for len(b) >= header {
		n := int(ne.Uint32(b))
		if n < header || n > len(b) {
			break
		}
		m := b[:n]
		b = b[min(len(b), (n+alignMask)&^alignMask):]
		flags := ne.Uint16(m[6:])
		if ne.Uint16(m[4:]) != unix.NLMSG_ERROR || len(m) < header+4+header {
			continue
		}
		a := ack{seq: ne.Uint32(m[8:]), errno: syscall.Errno(-int32(ne.Uint32(m[header:])))}
		at := header + 4 + header
		if flags&flagCap == 0 && a.errno != 0 {
			at = header + 4 + (int(ne.Uint32(m[header+4:]))+alignMask)&^alignMask
		}
		for flags&flagTLVs != 0 && at >= 0 && at+4 <= len(m) {
			alen := int(ne.Uint16(m[at:]))
			if alen < 4 || at+alen > len(m) {
				break
			}
			if ne.Uint16(m[at+2:])&typeMask == attrMsg {
				a.text = strings.TrimRight(string(m[at+4:at+alen]), "\x00")
			}
			at += (alen + alignMask) &^ alignMask
		}
		out = append(out, a)
	}
	return out
}
