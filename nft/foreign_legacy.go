// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file reads the tables of iptables-legacy, which nftables does not list:
// the kernel gives each as one block of entries (struct ipt_entry or
// ip6t_entry) with the offsets at which hooks begin.

const (
	soGetInfo    = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	soGetEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES

	xtTableName = 32
	xtHooks     = 5
	xtPartHead  = 32 // size, name of 29 bytes, revision
)

var legacyPriorities = map[string]int32{"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}

// legacyFamily holds what differs between the families.
type legacyFamily struct {
	nf      byte
	names   string // file with the tables in use
	program string
	af      int
	level   uintptr
	addrLen int
	head    int // sizeof the entry before its matches
	proto   int // offsets within the entry
	flags   int
	target  int
}

var legacyFamilies = []legacyFamily{
	{unix.NFPROTO_IPV4, "ip_tables_names", "iptables-legacy", unix.AF_INET, unix.SOL_IP, 4, 112, 80, 82, 88},
	{unix.NFPROTO_IPV6, "ip6_tables_names", "ip6tables-legacy", unix.AF_INET6, unix.SOL_IPV6, 16, 168, 128, 131, 140},
}

// addLegacy adds the chains of iptables-legacy. Only tables that are in use
// are asked for: asking for another would bring it into being.
func (t *theirTables) addLegacy() error {
	for i := range legacyFamilies {
		f := &legacyFamilies[i]
		b, err := os.ReadFile(filepath.Join(procNet, f.names))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("nft: reading the tables of %s: %w", f.program, err)
		}
		for _, table := range strings.Fields(string(b)) {
			if err := t.addLegacyTable(f, table); err != nil {
				return fmt.Errorf("nft: reading the table %s of %s: %w", table, f.program, err)
			}
		}
	}
	return nil
}

func (t *theirTables) addLegacyTable(f *legacyFamily, table string) error {
	fd, err := unix.Socket(f.af, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ne := binary.NativeEndian
	info := make([]byte, xtTableName+4+2*4*xtHooks+8)
	copy(info, table)
	if err := getsockopt(fd, f.level, soGetInfo, info); err != nil {
		return err
	}
	valid := ne.Uint32(info[xtTableName:])
	at := xtTableName + 4
	var entry, underflow [xtHooks]int
	for h := range xtHooks {
		entry[h] = int(ne.Uint32(info[at+4*h:]))
		underflow[h] = int(ne.Uint32(info[at+4*(xtHooks+h):]))
	}
	size := int(ne.Uint32(info[at+2*4*xtHooks+4:]))
	const head = 40 // struct ipt_get_entries up to the entries, aligned to 8
	block := make([]byte, head+size)
	copy(block, table)
	ne.PutUint32(block[xtTableName:], uint32(size))
	if err := getsockopt(fd, f.level, soGetEntries, block); err != nil {
		return err // EAGAIN: it changed meanwhile; the caller may ask again
	}
	return t.parseLegacy(f, table, block[head:], valid, entry, underflow)
}

func getsockopt(fd int, level uintptr, opt int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), level, uintptr(opt),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

var errLegacyEntry = errors.New("an entry does not fit its block")

// parseLegacy makes chains of a block of entries.
func (t *theirTables) parseLegacy(f *legacyFamily, table string, block []byte, valid uint32, entry, underflow [xtHooks]int) error {
	type placed struct {
		at   int
		rule *legacyRule
		name string // of a chain that begins behind this entry
		jump int    // offset of the chain jumped to, -1 for none
	}
	var all []placed
	ne := binary.NativeEndian
	for at := 0; at < len(block); {
		if at+f.head > len(block) {
			return errLegacyEntry
		}
		e := block[at:]
		targetAt, next := int(ne.Uint16(e[f.target:])), int(ne.Uint16(e[f.target+2:]))
		if next < f.head || next > len(e) || targetAt < f.head || targetAt+xtPartHead > next {
			return errLegacyEntry
		}
		r, err := parseLegacyEntry(f, e[:next], targetAt)
		if err != nil {
			return err
		}
		p := placed{at: at, rule: r, jump: -1}
		switch r.target.name {
		case "ERROR":
			p.name = cString(r.target.info)
		case "":
			if len(r.target.info) < 4 {
				return errLegacyEntry
			}
			const returns = -5 // XT_RETURN
			const flagGoto = 2
			switch code := int32(ne.Uint32(r.target.info)); {
			case code == returns:
				r.verdict = &theirVerdict{code: unix.NFT_RETURN}
			case code < 0:
				r.verdict = &theirVerdict{code: -code - 1}
			case int(code) == at+next:
				r.verdict = nil // no target: the next rule
				r.target.name = "LOG"
			default:
				p.jump = int(code)
				kind := int32(unix.NFT_JUMP)
				if e[f.flags]&flagGoto != 0 {
					kind = unix.NFT_GOTO
				}
				r.verdict = &theirVerdict{code: kind}
			}
		}
		all = append(all, p)
		at += next
	}
	key := func(name string) objectKey { return objectKey{f.nf, "legacy " + table, name} }
	// Chains begin at hooks and behind error entries, the last of which ends
	// the table.
	starts := map[int]*theirChain{}
	for h, name := range inetHooks[:xtHooks] {
		if valid&(1<<h) == 0 {
			continue
		}
		c := &theirChain{objectKey: key(strings.ToUpper(name)), hook: name, priority: legacyPriorities[table], kind: "filter", legacy: f.program}
		if table == "nat" {
			c.kind = "nat"
		}
		starts[entry[h]] = c
		t.base = append(t.base, c)
	}
	for i := range all {
		if all[i].name != "" && i+1 < len(all) {
			starts[all[i+1].at] = &theirChain{objectKey: key(all[i].name), legacy: f.program}
		}
	}
	for _, c := range starts {
		t.chains[c.objectKey] = c
	}
	var c *theirChain
	for i := range all {
		p := &all[i]
		if s := starts[p.at]; s != nil {
			c = s
		}
		if c == nil || p.name != "" || p.rule.target.name == "ERROR" {
			continue
		}
		if c.hook != "" && p.at == underflow[slices.Index(inetHooks, c.hook)] {
			c.drops = p.rule.verdict != nil && p.rule.verdict.code == verdictDrop
			continue
		}
		if p.jump >= 0 {
			to := starts[p.jump]
			if to == nil {
				return errLegacyEntry
			}
			p.rule.verdict.chain = to.name
		}
		c.rules = append(c.rules, theirRule{legacy: p.rule, text: p.rule.words(c.name)})
	}
	return nil
}

func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func parseLegacyEntry(f *legacyFamily, e []byte, targetAt int) (*legacyRule, error) {
	n := f.addrLen
	r := &legacyRule{
		family: f.nf, src: e[:n], dst: e[n : 2*n], srcMask: e[2*n : 3*n], dstMask: e[3*n : 4*n],
		in: cString(e[4*n : 4*n+16]), out: cString(e[4*n+16 : 4*n+32]), inMask: e[4*n+32 : 4*n+48], outMask: e[4*n+48 : 4*n+64],
		proto: binary.NativeEndian.Uint16(e[f.proto:]), invert: e[f.flags+1],
	}
	const flagFragment = 1
	r.isFragment = f.nf == unix.NFPROTO_IPV4 && e[f.flags]&flagFragment != 0
	part := func(b []byte) (legacyPart, int) {
		size := int(binary.NativeEndian.Uint16(b))
		if size < xtPartHead || size > len(b) {
			return legacyPart{}, -1
		}
		return legacyPart{name: cString(b[2:31]), rev: uint32(b[31]), info: b[xtPartHead:size]}, size
	}
	for at := f.head; at < targetAt; {
		m, size := part(e[at:targetAt])
		if size < 0 {
			return nil, errLegacyEntry
		}
		r.matches = append(r.matches, m)
		at += size
	}
	var size int
	if r.target, size = part(e[targetAt:]); size < 0 {
		return nil, errLegacyEntry
	}
	return r, nil
}
