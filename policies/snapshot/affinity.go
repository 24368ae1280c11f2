// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"fmt"
	"math"
)

// Affinity sends requests that have something in common to the same server: by
// a table from values to servers, or by a hash of the value. If that server is
// a candidate it is taken; else the affinity is skipped, and counted.
type Affinity struct {
	Key   AffinityKey
	Table []Pin

	// Hash spreads the values that are not in Table over Servers by weighted
	// rendezvous hashing: each server gets a share in proportion to its
	// configured weight, and when one goes, only its values move. An empty
	// Servers stands for all that are no backups.
	Hash    bool
	Servers []string
}

// AffinityKey is the part of a request that counts. Requests without it are
// left alone.
type AffinityKey struct {
	Field Field // a header field or cookie; without a name: the client's address

	// Bits4 and Bits6 are how many leading bits of the client's address count;
	// 0 stands for all.
	Bits4, Bits6 uint8
}

// Pin sends one value to one server.
type Pin struct {
	Value  string // an address in its usual form where the key is the client's address
	Server string
}

type affinityTable struct {
	field  fieldRef
	client bool
	bits4  uint8
	bits6  uint8
	pins   hashTable // value: server
	hash   bool
	groups []weightGroup
	name   string // of the key, for people
}

// weightGroup are the servers of one weight: among them the greatest hash
// wins, so that the logarithm is needed once per weight and not per server.
type weightGroup struct {
	weight  float64
	seeds   []uint64
	servers []uint16
}

func (s *Selector) compileAffinity(plugin string, in *Affinity) (*affinityTable, error) {
	fail := func(server, format string, args ...any) error {
		return &Error{Plugin: plugin, Server: server, Msg: fmt.Sprintf(format, args...)}
	}
	t := &affinityTable{hash: in.Hash, bits4: in.Key.Bits4, bits6: in.Key.Bits6}
	if in.Key.Field.Name == "" {
		t.client, t.name = true, "client address"
		if t.bits4 > 32 || t.bits6 > 128 {
			return nil, fail("", "has an affinity to %d bits of an IPv4 and %d of an IPv6 address", t.bits4, t.bits6)
		}
	} else {
		var err error
		if t.field, err = s.want(in.Key.Field); err != nil {
			return nil, fail("", "affinity: %v", err)
		}
		t.name = in.Key.Field.String()
	}
	seen := map[string]bool{}
	for _, p := range in.Table {
		n, ok := s.byName[p.Server]
		if !ok {
			return nil, fail(p.Server, notOfFarm)
		}
		key := p.Value
		if t.client {
			a, err := parseAddress(p.Value)
			if err != nil {
				return nil, fail("", "affinity: %v", err)
			}
			a = maskAddress(a, t.bits4, t.bits6)
			key = string(a[:])
		}
		if seen[key] {
			return nil, fail("", "affinity: the value %q is there twice", p.Value)
		}
		seen[key] = true
		t.pins.add(hashValue([]byte(key)), keyExact, 0, key, uint32(n))
	}
	t.pins.build()
	if !in.Hash {
		return t, nil
	}
	group := map[float64]int{}
	add := func(n int) {
		w := s.weights[n]
		g, ok := group[w]
		if !ok {
			g = len(t.groups)
			group[w] = g
			t.groups = append(t.groups, weightGroup{weight: w})
		}
		t.groups[g].seeds = append(t.groups[g].seeds, hashValue([]byte(s.servers[n].Name)))
		t.groups[g].servers = append(t.groups[g].servers, uint16(n))
	}
	twice := map[int]bool{}
	for _, name := range in.Servers {
		n, ok := s.byName[name]
		switch {
		case !ok:
			return nil, fail(name, notOfFarm)
		case twice[n]:
			return nil, fail(name, "is there twice in the affinity")
		}
		twice[n] = true
		add(n)
	}
	if len(in.Servers) == 0 {
		for n := range s.servers {
			if !s.servers[n].Backup {
				add(n)
			}
		}
	}
	return t, nil
}

// server returns the server that a request belongs to, -1 for none. present
// says whether the request has the key at all.
func (t *affinityTable) server(r *Request) (server int, present bool) {
	var addr [16]byte
	var key []byte
	if t.client {
		addr = maskAddress(r.Client, t.bits4, t.bits6)
		key = addr[:]
	} else if key = t.field.value(r); len(key) == 0 {
		return -1, false
	}
	h := hashValue(key)
	if v, ok := t.pins.find(h, keyExact, 0, key); ok {
		return int(v), true
	}
	if !t.hash {
		return -1, true
	}
	return t.rendezvous(h), true
}

// rendezvous is weighted highest-random-weight hashing (Thaler and
// Ravishankar, 1998): each server draws a number u in (0, 1) from the value and
// its own name, and the greatest −weight / ln u wins.
func (t *affinityTable) rendezvous(h uint64) int {
	best, at := -1.0, -1
	for i := range t.groups {
		g := &t.groups[i]
		var most uint64
		n := -1
		for k, seed := range g.seeds {
			x := (h ^ seed) * 0xbf58476d1ce4e5b9
			x = (x ^ x>>32) * 0x94d049bb133111eb
			if x ^= x >> 29; n < 0 || x > most {
				most, n = x, k
			}
		}
		if n < 0 {
			continue
		}
		if len(t.groups) == 1 {
			return int(g.servers[n])
		}
		u := (float64(most>>11) + 0.5) / (1 << 53)
		if score := -g.weight / math.Log(u); score > best {
			best, at = score, int(g.servers[n])
		}
	}
	return at
}

// hashValue spreads a value over all bits. It is the same in every process:
// values keep their servers over restarts, and on every router.
func hashValue(b []byte) uint64 {
	h := uint64(fnvOffset)
	for _, c := range b {
		h = hashStep(h, c)
	}
	return hashEnd(h, keyExact)
}

// mapped4 is how an IPv4 address begins in 16 bytes (RFC 4291 section 2.5.5.2).
var mapped4 = [12]byte{10: 0xff, 11: 0xff}

// maskAddress keeps the leading bits of an address; 0 keeps all.
func maskAddress(a [16]byte, bits4, bits6 uint8) [16]byte {
	bits := 128
	if [12]byte(a[:12]) == mapped4 {
		if bits4 != 0 {
			bits = 96 + int(min(bits4, 32))
		}
	} else if bits6 != 0 {
		bits = int(min(bits6, 128))
	}
	for i := bits / 8; i < 16; i++ {
		if i == bits/8 && bits%8 != 0 {
			a[i] &= 0xff << (8 - bits%8)
			continue
		}
		a[i] = 0
	}
	return a
}
