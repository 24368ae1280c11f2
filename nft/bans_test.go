// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestBan: the kernel drops what a banned client sends to a VIP, new
// connections and running ones, until its time is over; others, and what goes
// elsewhere, pass.
func TestBan(t *testing.T) {
	for _, owner := range []bool{true, false} {
		t.Run(fmt.Sprintf("owned %t", owner), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, e ends) { testBan(t, e, owner) })
		})
	}
}

func testBan(t *testing.T, e ends, owner bool) {
	l := newLab(t)
	p := labParams()
	k := probed(t)
	if owner && !k.Owner {
		t.Skip("skipped: needs a kernel with owned tables")
	}
	k.Owner = owner
	f := install(t, p, k, nil)
	q := listen(t, p.QueueFirst, p.Queues(), nil)
	if err := f.Ban([]Ban{{Client: e.client, For: time.Hour}}); err != nil {
		t.Fatal(err)
	}
	list := nftList(t, "table", "inet", p.Table)
	if !strings.Contains(list, e.client.String()+" timeout 1h") {
		t.Errorf("nft does not show the ban:\n%s", list)
	}
	l.send(t, l.client, 0, e.fromClient(40000, syn), e.fromClient(40000, ackFlag))
	waitCounter(t, f, CounterBanned, 2)
	// What is not for a VIP is none of our business.
	refused := resets(t)
	l.send(t, l.client, 0, tcpPacket(at(e.client, 40000), at(e.vip, 81), ackFlag, ""))
	eventually(t, "the router's RST", func() bool { return resets(t) == refused+1 })
	// It outlives a new installation, and what is asked for again may
	// only be longer.
	if err := f.Ban([]Ban{{Client: e.client, For: time.Second}}); err != nil {
		t.Fatal(err)
	}
	if err := f.Reinstall(); err != nil {
		t.Fatal(err)
	}
	l.send(t, l.client, 0, e.fromClient(40000, syn))
	waitCounter(t, f, CounterBanned, 1)
	if err := f.Ban([]Ban{{Client: e.client, For: 2 * time.Hour}}); err != nil {
		t.Fatal(err)
	}
	if list := nftList(t, "table", "inet", p.Table); !strings.Contains(list, " timeout 2h") {
		t.Errorf("nft does not show the longer ban:\n%s", list)
	}
	if n := len(q.all()); n != 0 {
		t.Errorf("%d packets of a banned client are queued", n)
	}
	if err := f.Update(p); err != nil {
		t.Fatal(err)
	}
	if list := nftList(t, "table", "inet", p.Table); !strings.Contains(list, " timeout 2h") {
		t.Errorf("an update takes bans along:\n%s", list)
	}
	// A successor of a killed instance takes them over.
	if err := f.Leave(); err != nil {
		t.Fatal(err)
	}
	if f, err := Install(p, k); err != nil {
		t.Fatal(err)
	} else if list := nftList(t, "table", "inet", p.Table); !strings.Contains(list, " timeout 2h") {
		t.Errorf("a successor forgets bans:\n%s", list)
	} else if err := f.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := f.Ban([]Ban{{Client: client4, For: time.Hour}}); !errors.Is(err, ErrTableGone) {
		t.Errorf("a ban after the end: %v", err)
	}
}

// TestBanEnds: a ban ends by itself.
func TestBanEnds(t *testing.T) {
	l := newLab(t)
	p := labParams()
	install(t, p, probed(t), nil).ban(t, client4, 300*time.Millisecond)
	q := listen(t, p.QueueFirst, p.Queues(), nil)
	eventually(t, "a SYN in the queue", func() bool {
		l.send(t, l.client, 0, tcpPacket(at(client4, 40000), at(vip4, 80), syn, ""))
		return len(q.all()) > 0
	})
	if port := binary.BigEndian.Uint16(q.all()[0].data[20:]); port != 40000 {
		t.Errorf("port %d", port)
	}
}

func (f *Firewall) ban(t *testing.T, a netip.Addr, d time.Duration) {
	t.Helper()
	if err := f.Ban([]Ban{{Client: a, For: d}}); err != nil {
		t.Fatal(err)
	}
}

// TestBanBounds: odd requests are left out, and many fit.
func TestBanBounds(t *testing.T) {
	newNetns(t)
	p := labParams()
	f := install(t, p, probed(t), nil)
	const place = 5 // for so many more
	f.bans = map[netip.Addr]time.Time{}
	a := netip.MustParseAddr("198.18.0.0")
	for range MaxBans - place {
		f.bans[a] = time.Now().Add(time.Hour)
		a = a.Next()
	}
	var list []Ban
	for range place + 10 {
		list = append(list, Ban{Client: a, For: time.Hour})
		a = a.Next()
	}
	list = append(list, Ban{}, Ban{Client: a}, Ban{Client: netip.MustParseAddr("::ffff:198.51.100.7"), For: -time.Hour})
	if err := f.Ban(list); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(nftList(t, "set", "inet", p.Table, "bans4"), "timeout 1h"); n != place {
		t.Errorf("%d bans, want %d", n, place)
	}
	if err := f.Ban(nil); err != nil {
		t.Error(err)
	}
}

// TestBanWatched: bans come and go without the table looking changed, and are
// there again after somebody removed it.
func TestBanWatched(t *testing.T) {
	newNetns(t)
	p := labParams()
	k := probed(t)
	k.Owner = false
	f, _, events := watched(t, p, k)
	f.ban(t, client4, 200*time.Millisecond)
	f.ban(t, client6, time.Hour)
	eventually(t, "the end of the short ban", func() bool {
		return !strings.Contains(nftList(t, "set", "inet", p.Table, "bans4"), client4.String())
	})
	nftRun(t, "", "delete", "table", "inet", p.Table)
	expect(t, events, Restored)
	if n := f.Restored(); n != 1 {
		t.Errorf("restored %d times, want once: bans are no change", n)
	}
	if list := nftList(t, "set", "inet", p.Table, "bans6"); !strings.Contains(list, client6.String()) {
		t.Errorf("the ban is lost:\n%s", list)
	}
}
