// SPDX-License-Identifier: Apache-2.0

// Package capture writes packets to files that other programs can open, reads
// such files, and writes segments down as the patent does.
//
// It knows the pcapng format as far as it writes it, and reads that and the
// older pcap with the link types that carry IP. It must not capture anything
// itself: packets are handed to it.
package capture

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// Blocks and options of pcapng (draft-ietf-opsawg-pcapng).
const (
	blockSection   = 0x0a0d0d0a
	blockInterface = 1
	blockSimple    = 3
	blockEnhanced  = 6

	optEnd      = 0
	optComment  = 1
	optIfName   = 2
	optTsResol  = 9
	optEpbFlags = 2
	optAppl     = 4

	byteOrderMagic = 0x1a2b3c4d
	magicMicro     = 0xa1b2c3d4
	magicNano      = 0xa1b23c4d
)

// Link types that carry IP packets.
const (
	linkNull     = 0
	linkEthernet = 1
	linkRaw12    = 12
	linkRaw14    = 14
	linkRaw      = 101
	linkSLL      = 113
	linkIPv4     = 228
	linkIPv6     = 229
	linkSLL2     = 276
)

// maxBlock bounds one block of a file that is read, bytes.
const maxBlock = 16 << 20

// Writer writes one pcapng section. Its interfaces are Ethernet with empty
// addresses, because there are readers that take no two interfaces of raw IP.
type Writer struct {
	w   io.Writer
	buf []byte
}

// NewWriter writes the head of a file with these interfaces, which are numbered
// from 0. program names who wrote it.
func NewWriter(w io.Writer, program string, interfaces ...string) (*Writer, error) {
	p := &Writer{w: w}
	p.block(blockSection, func(b []byte) []byte {
		b = binary.LittleEndian.AppendUint32(b, byteOrderMagic)
		b = binary.LittleEndian.AppendUint16(b, 1)
		b = binary.LittleEndian.AppendUint16(b, 0)
		b = binary.LittleEndian.AppendUint64(b, 1<<64-1) // length unknown
		return endOptions(option(b, optAppl, []byte(program)))
	})
	for _, name := range interfaces {
		p.block(blockInterface, func(b []byte) []byte {
			b = binary.LittleEndian.AppendUint16(b, linkEthernet)
			b = binary.LittleEndian.AppendUint16(b, 0)
			b = binary.LittleEndian.AppendUint32(b, 0) // no limit of length
			b = option(b, optIfName, []byte(name))
			b = option(b, optTsResol, []byte{9}) // nanoseconds
			return endOptions(b)
		})
	}
	return p, p.flush()
}

// Packet is one packet of a file.
type Packet struct {
	Time      time.Time
	Interface int
	Outgoing  bool   // written: sent by the host; read: false where the file does not say
	Data      []byte // from the IP header on; valid until the next one when read
	Len       int    // on the wire; 0 when written: that of Data
	Comment   string
}

// Write appends a packet.
func (p *Writer) Write(k *Packet) error {
	p.block(blockEnhanced, func(b []byte) []byte {
		t := uint64(k.Time.UnixNano())
		b = binary.LittleEndian.AppendUint32(b, uint32(k.Interface))
		b = binary.LittleEndian.AppendUint32(b, uint32(t>>32))
		b = binary.LittleEndian.AppendUint32(b, uint32(t))
		b = binary.LittleEndian.AppendUint32(b, uint32(etherLen+len(k.Data)))
		b = binary.LittleEndian.AppendUint32(b, uint32(etherLen+max(k.Len, len(k.Data))))
		b = append(b, make([]byte, etherLen-2)...)
		if len(k.Data) > 0 && k.Data[0]>>4 == 6 {
			b = append(b, 0x86, 0xdd)
		} else {
			b = append(b, 0x08, 0x00)
		}
		b = append(b, k.Data...)
		b = append(b, make([]byte, -(etherLen+len(k.Data))&3)...)
		flags := uint32(1) // inbound
		if k.Outgoing {
			flags = 2
		}
		if k.Comment != "" {
			b = option(b, optComment, []byte(k.Comment))
		}
		b = option(b, optEpbFlags, binary.LittleEndian.AppendUint32(nil, flags))
		return endOptions(b)
	})
	return p.flush()
}

// block appends a block to the buffer. Blocks are whole numbers of 32 bits, and
// their length stands at both ends.
func (p *Writer) block(kind uint32, body func([]byte) []byte) {
	start := len(p.buf)
	p.buf = binary.LittleEndian.AppendUint32(p.buf, kind)
	p.buf = binary.LittleEndian.AppendUint32(p.buf, 0)
	p.buf = body(p.buf)
	n := uint32(len(p.buf) - start + 4)
	binary.LittleEndian.PutUint32(p.buf[start+4:], n)
	p.buf = binary.LittleEndian.AppendUint32(p.buf, n)
}

func (p *Writer) flush() error {
	_, err := p.w.Write(p.buf)
	p.buf = p.buf[:0]
	return err
}

// etherLen is the length of an Ethernet header.
const etherLen = 14

func option(b []byte, code uint16, value []byte) []byte {
	value = value[:min(len(value), 0xffff)]
	b = binary.LittleEndian.AppendUint16(b, code)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
	b = append(b, value...)
	return append(b, make([]byte, -len(value)&3)...)
}

func endOptions(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, optEnd) }

// ErrFormat says that a file is none that is known here.
var ErrFormat = errors.New("neither pcap nor pcapng")

// Reader reads the IP packets of a file.
type Reader struct {
	r     *bufio.Reader
	order binary.ByteOrder
	ng    bool
	links []link // by interface
	buf   []byte
	// Skipped counts packets that are not IP.
	Skipped int
}

type link struct {
	kind uint32
	unit float64 // seconds per tick of the clock
}

// NewReader reads the head of a file.
func NewReader(r io.Reader) (*Reader, error) {
	f := &Reader{r: bufio.NewReader(r), order: binary.LittleEndian}
	head, err := f.r.Peek(12)
	if err != nil {
		return nil, fmt.Errorf("%w: it is too short", ErrFormat)
	}
	if binary.LittleEndian.Uint32(head) == blockSection {
		f.ng = true
		return f, nil
	}
	for _, o := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		f.order = o
		unit := 1e-6
		switch o.Uint32(head) {
		case magicNano:
			unit = 1e-9
		case magicMicro:
		default:
			continue
		}
		b, err := f.read(24)
		if err != nil {
			return nil, fmt.Errorf("%w: it is too short", ErrFormat)
		}
		f.links = []link{{o.Uint32(b[20:]) & 0x0fffffff, unit}}
		return f, f.known(f.links[0].kind)
	}
	return nil, ErrFormat
}

func (f *Reader) known(kind uint32) error {
	switch kind {
	case linkNull, linkEthernet, linkRaw12, linkRaw14, linkRaw, linkSLL, linkIPv4, linkIPv6, linkSLL2:
		return nil
	}
	return fmt.Errorf("link type %d is not known here", kind)
}

func (f *Reader) read(n int) ([]byte, error) {
	if cap(f.buf) < n {
		f.buf = make([]byte, n)
	}
	f.buf = f.buf[:n]
	_, err := io.ReadFull(f.r, f.buf)
	return f.buf, err
}

// Next returns the next IP packet, io.EOF at the end of the file. A file that
// ends within a packet was cut off while it was written: io.ErrUnexpectedEOF.
func (f *Reader) Next() (*Packet, error) {
	for {
		k, kind, err := f.next()
		if err != nil {
			return nil, err
		}
		if k == nil {
			continue
		}
		n := len(k.Data)
		if k.Data = ipOf(kind, k.Data); k.Data != nil {
			k.Len -= n - len(k.Data)
		} else {
			f.Skipped++
			continue
		}
		return k, nil
	}
}

func (f *Reader) next() (*Packet, uint32, error) {
	if f.ng {
		return f.nextBlock()
	}
	b, err := f.read(16)
	if err != nil {
		return nil, 0, err
	}
	sec, frac, n, length := f.order.Uint32(b), f.order.Uint32(b[4:]), f.order.Uint32(b[8:]), f.order.Uint32(b[12:])
	if n > maxBlock {
		return nil, 0, fmt.Errorf("a packet of %d bytes: %w", n, ErrFormat)
	}
	l := f.links[0]
	k := &Packet{Time: time.Unix(int64(sec), int64(float64(frac)*l.unit*1e9+0.5)), Len: int(length)}
	if k.Data, err = f.read(int(n)); err != nil {
		return nil, 0, io.ErrUnexpectedEOF
	}
	return k, l.kind, nil
}

func (f *Reader) nextBlock() (*Packet, uint32, error) {
	head, err := f.r.Peek(12)
	if len(head) == 0 {
		return nil, 0, err
	}
	if err != nil {
		return nil, 0, io.ErrUnexpectedEOF
	}
	if binary.LittleEndian.Uint32(head) == blockSection {
		f.order = binary.LittleEndian
		if binary.LittleEndian.Uint32(head[8:]) != byteOrderMagic {
			f.order = binary.BigEndian
		}
		f.links = nil // a new section has interfaces of its own
	}
	kind, n := f.order.Uint32(head), f.order.Uint32(head[4:])
	if n < 12 || n > maxBlock || n%4 != 0 {
		return nil, 0, fmt.Errorf("a block of %d bytes: %w", n, ErrFormat)
	}
	b, err := f.read(int(n))
	if err != nil {
		return nil, 0, io.ErrUnexpectedEOF
	}
	b = b[8 : n-4]
	switch {
	case kind == blockInterface && len(b) >= 8:
		l := link{uint32(f.order.Uint16(b)), 1e-6}
		f.options(b[8:], func(code uint16, v []byte) {
			if code == optTsResol && len(v) > 0 {
				l.unit = resolution(v[0])
			}
		})
		f.links = append(f.links, l)
		return nil, 0, f.known(l.kind)
	case kind == blockEnhanced && len(b) >= 20:
		i, size := int(f.order.Uint32(b)), int(f.order.Uint32(b[12:]))
		if i >= len(f.links) || size > len(b)-20 {
			return nil, 0, fmt.Errorf("a packet block that contradicts itself: %w", ErrFormat)
		}
		ticks := float64(uint64(f.order.Uint32(b[4:]))<<32 | uint64(f.order.Uint32(b[8:])))
		k := &Packet{Time: ticksTime(uint64(f.order.Uint32(b[4:]))<<32|uint64(f.order.Uint32(b[8:])), ticks, f.links[i].unit), Interface: i, Len: int(f.order.Uint32(b[16:])), Data: b[20 : 20+size]}
		f.options(b[min(20+(size+3)/4*4, len(b)):], func(code uint16, v []byte) {
			switch {
			case code == optComment:
				k.Comment = string(v)
			case code == optEpbFlags && len(v) == 4:
				k.Outgoing = f.order.Uint32(v)&3 == 2
			}
		})
		return k, f.links[i].kind, nil
	case kind == blockSimple && len(b) >= 4 && len(f.links) > 0:
		n := int(f.order.Uint32(b))
		return &Packet{Len: n, Data: b[4:min(4+n, len(b))]}, f.links[0].kind, nil
	}
	return nil, 0, nil
}

// ticksTime keeps nanoseconds exact, which a floating-point number does not.
func ticksTime(n uint64, ticks, unit float64) time.Time {
	switch unit {
	case 1e-9:
		return time.Unix(0, int64(n))
	case 1e-6:
		return time.UnixMicro(int64(n))
	}
	sec := ticks * unit
	whole := int64(sec)
	return time.Unix(whole, int64((sec-float64(whole))*1e9))
}

// resolution is the unit of an interface's clock: a negative power of ten, or
// of two with the highest bit set.
func resolution(v byte) float64 {
	base, unit := 10.0, 1.0
	if v&0x80 != 0 {
		base = 2
	}
	switch v {
	case 9:
		return 1e-9
	case 6:
		return 1e-6
	}
	for range v & 0x7f {
		unit /= base
	}
	return unit
}

func (f *Reader) options(b []byte, do func(code uint16, value []byte)) {
	for len(b) >= 4 {
		code, n := f.order.Uint16(b), int(f.order.Uint16(b[2:]))
		if code == optEnd || n > len(b)-4 {
			return
		}
		do(code, b[4:4+n])
		b = b[min(4+(n+3)/4*4, len(b)):]
	}
}

// ipOf takes the link header off; nil if the packet is not IP.
func ipOf(kind uint32, b []byte) []byte {
	ether := func(proto uint16, rest []byte) []byte {
		for (proto == 0x8100 || proto == 0x88a8) && len(rest) >= 4 { // VLAN tags
			proto, rest = binary.BigEndian.Uint16(rest[2:]), rest[4:]
		}
		if proto == 0x0800 || proto == 0x86dd {
			return rest
		}
		return nil
	}
	switch kind {
	case linkEthernet:
		if len(b) < 14 {
			return nil
		}
		b = ether(binary.BigEndian.Uint16(b[12:]), b[14:])
	case linkSLL:
		if len(b) < 16 {
			return nil
		}
		b = ether(binary.BigEndian.Uint16(b[14:]), b[16:])
	case linkSLL2:
		if len(b) < 20 {
			return nil
		}
		b = ether(binary.BigEndian.Uint16(b), b[20:])
	case linkNull:
		if len(b) < 4 {
			return nil
		}
		b = b[4:]
	}
	if len(b) == 0 || b[0]>>4 != 4 && b[0]>>4 != 6 {
		return nil
	}
	// Short packets are padded by the link.
	n := len(b)
	switch {
	case b[0]>>4 == 4 && len(b) >= 20:
		n = int(binary.BigEndian.Uint16(b[2:]))
	case b[0]>>4 == 6 && len(b) >= 40:
		n = 40 + int(binary.BigEndian.Uint16(b[4:]))
	}
	return b[:min(n, len(b))]
}
