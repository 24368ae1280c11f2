// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"math/rand/v2"
	"time"
)

// Direction is one of the two ways through a wire.
type Direction int

// The directions, named after the order of the interfaces.
const (
	AB Direction = iota
	BA
)

// Other is the opposite direction.
func (d Direction) Other() Direction { return 1 - d }

func (d Direction) String() string { return [...]string{"a to b", "b to a"}[d] }

// Impairment is what one direction does to IP packets. Probabilities are per
// packet, from 0 to 1. The zero value passes everything. ARP and neighbour
// discovery always pass.
type Impairment struct {
	Loss      float64
	Reorder   float64 // kept back for up to Late, so that others overtake it
	Duplicate float64 // the second copy comes at once or up to Late later
	Corrupt   float64 // the bits of one byte
	Delay     time.Duration
	// Late bounds how long a packet is kept back beyond Delay; 0 means 3 ms.
	Late time.Duration
	// MTU is the size of an IP packet, in bytes, beyond which IPv6 and IPv4
	// with DF are answered by an ICMP error and IPv4 without DF is cut into
	// fragments; 0 means none. A changed MTU counts from the next packet on.
	MTU int
	// BlackHole has the wire swallow what is larger than its MTU without the
	// ICMP error.
	BlackHole bool
	// Tamper, if not nil, sees each IP packet first, may change its bytes, and
	// says whether it goes on: for negative controls. The reader calls it, for
	// one packet after the other. What it stops has had its fate drawn.
	Tamper func(ip []byte) bool
}

// A Fate is what becomes of one packet.
type Fate struct {
	Lost, Reordered, Duplicated, Corrupted bool

	Late      time.Duration // of a reordered packet
	CopyLate  time.Duration // of the duplicate
	Place     uint32        // chooses the byte that is corrupted
	Different byte          // its bits that change; not 0
}

// Fate says what becomes of the n-th IP packet, counted from 0, of a direction.
func (i *Impairment) Fate(seed uint64, d Direction, n uint64) Fate {
	src := rand.NewPCG(seed, uint64(d)<<63|n)
	r := rand.New(src)
	late := int64(i.Late)
	if late <= 0 {
		late = int64(3 * time.Millisecond)
	}
	// Every packet draws the same numbers, whatever the probabilities are.
	f := Fate{
		Lost: r.Float64() < i.Loss, Reordered: r.Float64() < i.Reorder,
		Duplicated: r.Float64() < i.Duplicate, Corrupted: r.Float64() < i.Corrupt,
	}
	f.Late = time.Duration(1 + r.Int64N(late))
	f.CopyLate = time.Duration(r.Int64N(late))
	if r.IntN(2) == 0 {
		f.CopyLate = 0
	}
	f.Place = r.Uint32()
	f.Different = byte(1 + r.IntN(255))
	return f
}

// Stats counts what one direction has done with IP packets.
type Stats struct {
	Packets    uint64 // that came
	Lost       uint64
	Reordered  uint64
	Duplicated uint64
	Corrupted  uint64
	TooBig     uint64 // answered by ICMP
	Fragmented uint64
	// BadChecksum are packets that came with a wrong TCP or IPv4 checksum: the
	// sender's offload is on, or it let a corrupted packet through.
	BadChecksum uint64
	// Overrun are packets that the kernel did not take, beside all chance.
	Overrun uint64
}
