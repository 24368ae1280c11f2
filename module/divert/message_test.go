// SPDX-License-Identifier: Apache-2.0

package divert

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/module/packet"
)

// attr appends one netlink attribute.
func attr(b []byte, typ uint16, v []byte) []byte {
	b = ne.AppendUint16(b, uint16(attrHdr+len(v)))
	b = ne.AppendUint16(b, typ)
	b = append(b, v...)
	return append(b, make([]byte, -len(b)&3)...)
}

// packetMessage makes a message of the kernel.
func packetMessage(attrs ...func([]byte) []byte) []byte {
	b := make([]byte, nfHeader)
	for _, a := range attrs {
		b = a(b)
	}
	ne.PutUint32(b, uint32(len(b)))
	ne.PutUint16(b[4:], msgPacket)
	b[16] = unix.AF_INET
	return b
}

func with(typ uint16, v ...byte) func([]byte) []byte {
	return func(b []byte) []byte { return attr(b, typ, v) }
}

var packetHeader = with(attrPacketHdr, 0, 0, 1, 2, 8, 0, 0)

func TestParseMessage(t *testing.T) {
	for _, c := range []struct {
		name string
		b    []byte
		cut  bool
		want message
		kind messageKind
	}{
		{name: "packet", kind: kindPacket,
			b:    packetMessage(packetHeader, with(attrInDev, 0, 0, 0, 9), with(attrMark, 0x57, 0, 0, 1), with(attrSkbInfo, 0, 0, 0, 3), with(attrPayload, 1, 2, 3, 4, 5)),
			want: message{id: 0x102, inIf: 9, mark: 0x57000001, flags: 3, payload: 60, length: 5}},
		{name: "nothing but a payload", kind: kindPacket,
			b: packetMessage(packetHeader, with(attrPayload, 1)), want: message{id: 0x102, payload: 36, length: 1}},
		{name: "truncated", kind: kindPacket,
			b:    packetMessage(packetHeader, with(attrCapLen, 0, 0, 9, 9), with(attrPayload, 1)),
			want: message{id: 0x102, payload: 44, length: 1, truncated: true}},
		{name: "flags in the type", kind: kindPacket,
			b: packetMessage(packetHeader, with(attrPayload|0x8000, 1)), want: message{id: 0x102, payload: 36, length: 1}},
		{name: "cut", cut: true, kind: kindMalformed,
			b: packetMessage(packetHeader, with(attrPayload, 1)), want: message{id: 0x102, payload: 36, length: 1}},
		{name: "no payload", kind: kindMalformed, b: packetMessage(packetHeader), want: message{id: 0x102}},
		{name: "empty payload", kind: kindMalformed, b: packetMessage(packetHeader, with(attrPayload)), want: message{id: 0x102, payload: 36}},
		{name: "no id", kind: kindMalformed, b: packetMessage(with(attrPayload, 1)), want: message{payload: 24, length: 1}},
		{name: "short", kind: kindMalformed, b: make([]byte, 15)},
		{name: "refused verdict", kind: kindVerdictError,
			b: errorMessage(-int32(unix.ENOENT), 77)},
		{name: "acknowledgment", kind: kindNothing, b: errorMessage(0, 77)},
		{name: "batch without packets", kind: kindNothing, b: errorMessage(-int32(unix.ENOENT), batchSeq)},
	} {
		m, kind := parseMessage(c.b, c.cut)
		if m != c.want || kind != c.kind {
			t.Errorf("%s: %+v, kind %d; want %+v, kind %d", c.name, m, kind, c.want, c.kind)
		}
	}
}

func errorMessage(errno int32, seq uint32) []byte {
	b := make([]byte, nlHeader+4+nlHeader)
	ne.PutUint32(b, uint32(len(b)))
	ne.PutUint16(b[4:], unix.NLMSG_ERROR)
	ne.PutUint32(b[8:], seq)
	ne.PutUint32(b[nlHeader:], uint32(errno))
	return b
}

// TestParseDamaged changes, cuts and prolongs messages at random: nothing may
// panic, and what is found must lie within the message.
func TestParseDamaged(t *testing.T) {
	s := rand.Uint64()
	if v := os.Getenv("WEIR_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("WEIR_SEED=%d", s)
	r := rand.New(rand.NewPCG(s, s))
	for range 200_000 {
		b := packetMessage(packetHeader, with(attrInDev, 0, 0, 0, 9), with(attrSkbInfo, 0, 0, 0, 3), with(attrPayload, make([]byte, r.IntN(50))...))
		for range r.IntN(4) {
			b[r.IntN(len(b))] = byte(r.IntN(256))
		}
		b = append(b, make([]byte, r.IntN(5))...)
		b = b[:len(b)-r.IntN(len(b))]
		m, kind := parseMessage(b, r.IntN(4) == 0)
		if kind == kindPacket && (m.payload < nfHeader || m.length < 1 || m.payload+m.length > len(b)) {
			t.Fatalf("%x: payload %d+%d", b, m.payload, m.length)
		}
	}
}

// TestVerdictBytes compares verdicts with bytes spelled out by hand.
func TestVerdictBytes(t *testing.T) {
	if ne.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes below are those of a little-endian machine")
	}
	b := make([]byte, rewriteLen)
	check := func(name string, n int, want string) {
		t.Helper()
		w, err := hex.DecodeString(strings.ReplaceAll(want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b[:n], w) {
			t.Errorf("%s:\n got %x\nwant %x", name, b[:n], w)
		}
	}
	n := putVerdict(b, msgVerdict, 0x5700, 0x01020304, 0x01020304, nfDrop)
	check("drop", n, "20000000 0103 0100 04030201 00000000 00 00 5700 0c00 0200 00000000 01020304")
	n = putVerdict(b, msgVerdictBatch, 0x5700, batchSeq, 5, nfDrop)
	check("batch", n, "20000000 0303 0100 ffffffff 00000000 00 00 5700 0c00 0200 00000000 00000005")
	putVerdict(b, msgVerdict, 7, 1, 1, nfAccept)
	n = putMark(b, 0x57000001)
	check("mark", n, "28000000 0103 0100 01000000 00000000 00 00 0007 0c00 0200 00000001 00000001 0800 0300 57000001")
	n = putPayload(b, 5)
	if n != rewriteLen+8 {
		t.Errorf("a message with 5 bytes of payload has %d bytes", n)
	}
	check("payload", rewriteLen, "34000000 0103 0100 01000000 00000000 00 00 0007 0c00 0200 00000001 00000001 0800 0300 57000001 0900 0a00")
}

func TestChecksumState(t *testing.T) {
	for _, c := range []struct {
		flags uint32
		hook  uint8
		want  packet.ChecksumState
	}{
		{0, 0, packet.ChecksumVerified},
		{0, hookForward, packet.ChecksumVerified},
		{0, hookForward + 1, packet.ChecksumUnknown},
		{skbCsumNotVerified, 0, packet.ChecksumUnknown},
		{skbCsumNotReady, 0, packet.ChecksumPartial},
		{skbCsumNotReady | skbGSO, 4, packet.ChecksumPartial},
	} {
		if got := checksumState(c.flags, c.hook); got != c.want {
			t.Errorf("flags %d at hook %d: %v, want %v", c.flags, c.hook, got, c.want)
		}
	}
}

func TestParseKernelStats(t *testing.T) {
	text := "22272   1234     5 2 65531    17    19     4711  1\n    7 4294967295     0 2 65531     0     0        0  1\n"
	all, err := parseKernelStats([]byte(text), nil)
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	want := KernelStats{Queue: 22272, PortID: 1234, Waiting: 5, CopyMode: 2, CopyRange: 65531, DroppedQueueFull: 17, DroppedUser: 19, LastID: 4711}
	if all[0] != want {
		t.Errorf("%+v, want %+v", all[0], want)
	}
	if some, err := parseKernelStats([]byte(text), []uint16{7}); err != nil || len(some) != 1 || some[0].PortID != 1<<32-1 {
		t.Error(some, err)
	}
	for _, bad := range []string{"1 2 3\n", "1 2 3 4 5 6 x 8 9\n"} {
		if _, err := parseKernelStats([]byte(bad), nil); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want error
	}{
		{openError(7, "x", unix.EPERM), ErrPermission},
		{openError(7, "x", unix.EPROTONOSUPPORT), ErrUnsupported},
		{bindError(7, unix.EPERM), ErrQueueInUse},
		{bindError(7, unix.EBUSY), ErrQueueInUse},
		{bindError(7, unix.EOPNOTSUPP), ErrUnsupported},
		{procError(os.ErrNotExist), ErrUnsupported},
		{procError(os.ErrPermission), ErrPermission},
	} {
		for _, e := range []error{ErrPermission, ErrUnsupported, ErrQueueInUse} {
			if errors.Is(c.err, e) != (e == c.want) {
				t.Errorf("%v: is %v: %v", c.err, e, errors.Is(c.err, e))
			}
		}
	}
	if got := bindError(7, unix.EPERM).Error(); got != "divert: queue 7: bind: in use by another program (operation not permitted)" {
		t.Errorf("message: %s", got)
	}
}
