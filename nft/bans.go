// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"time"
)

// Ban says that a client is to be kept away from the VIPs.
type Ban struct {
	Client netip.Addr
	For    time.Duration // from now; in steps of a millisecond
}

// MaxBans bounds the bans that hold at one time; what comes beyond is left out.
const MaxBans = 65536

// Ban puts clients into the sets of banned ones, in one transaction: from here
// on the kernel drops what they send to a VIP, until their time is over. A
// client that is banned already gets the longer time. Bans outlive Update,
// Reinstall, and an instance that was killed.
func (f *Firewall) Ban(list []Ban) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return fmt.Errorf("nft: table inet %s: %w", f.r.Table, ErrTableGone)
	}
	now := time.Now()
	maps.DeleteFunc(f.bans, func(_ netip.Addr, until time.Time) bool { return !until.After(now) })
	if f.bans == nil {
		f.bans = map[netip.Addr]time.Time{}
	}
	fresh := map[netip.Addr]time.Time{}
	for _, b := range list {
		a, until := b.Client.Unmap().WithZone(""), now.Add(b.For)
		old, known := f.bans[a]
		if b.For < time.Millisecond || !a.IsValid() || known && !until.After(old) || !known && len(f.bans) >= MaxBans {
			continue
		}
		f.bans[a], fresh[a] = until, until
	}
	if len(fresh) == 0 {
		return nil
	}
	b, err := bansBatch(f.r.Table, banSets(fresh, now))
	if err != nil {
		return err
	}
	return f.sendElements(b, f.r)
}

// banSets are the two sets with these clients.
func banSets(bans map[netip.Addr]time.Time, now time.Time) []Set {
	sets := []Set{{Name: setBans + family4.suffix, Type: SetAddr4, Timeout: true}, {Name: setBans + family6.suffix, Type: SetAddr6, Timeout: true}}
	for a, until := range bans {
		e := addrElement(a)
		if e.timeout = until.Sub(now); e.timeout < time.Millisecond {
			continue
		}
		s := &sets[0]
		if a.Is6() {
			s = &sets[1]
		}
		s.Elements = append(s.Elements, e)
	}
	return sets
}

// bansBatch gives the elements their time. The kernel leaves that of an element
// as it is when it is added again, so each is added to be there, deleted, and
// added.
func bansBatch(table string, sets []Set) (*batch, error) {
	e, err := newEncoder(table)
	if err != nil {
		return nil, err
	}
	for i := range sets {
		if len(sets[i].Elements) == 0 {
			continue
		}
		s := e.namedSet(&sets[i])
		e.elements(s, sets[i].Elements)
		e.deleteElements(s, sets[i].Elements)
		e.elements(s, sets[i].Elements)
	}
	return e.batch()
}

// withBans is the ruleset with the clients that are banned now, for an
// installation.
func (f *Firewall) withBans() *Ruleset {
	if len(f.bans) == 0 {
		return f.r
	}
	r := *f.r
	r.Sets = append([]Set(nil), f.r.Sets...)
	for _, b := range banSets(f.bans, time.Now()) {
		if s := r.Set(b.Name); s != nil {
			s.Elements = b.Elements
		}
	}
	return &r
}
