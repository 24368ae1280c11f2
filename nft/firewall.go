// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNeedsRestart: Update was asked for something that is not a change of set
// elements.
var ErrNeedsRestart = errors.New("takes effect at the next restart only")

// ErrTableGone: our table is not there; somebody removed it, or Remove did.
var ErrTableGone = errors.New("the table is not installed")

// Counter is a named counter's value since the table was installed.
type Counter struct {
	Packets, Bytes uint64
}

// Firewall is an installed ruleset. It is safe for concurrent use. It acts in
// the network namespace of the thread that called Install where the kernel has
// owned tables; elsewhere every method opens a socket of its own and must be
// called from a thread of that namespace.
type Firewall struct {
	mu    sync.Mutex
	p     Params
	k     Kernel
	r     *Ruleset
	owner *conn                    // nil without k.Owner, and after Remove
	gone  bool                     // after Remove
	bans  map[netip.Addr]time.Time // until when
	stale []*ipFamily              // companions of a predecessor, for the first batch to remove

	// Of a Watcher, where the table is not owned.
	guard    *Guard
	seen     string // fingerprint of the table as we made it last; empty unwatched
	restored atomic.Uint64
}

// Install puts the table into the kernel, in one transaction that also removes
// whatever stands under its name: what a killed predecessor left stays in force
// up to the packet from which the new rules are. It never touches another
// table. With Kernel.Owner the table is owned by the returned Firewall's
// socket: nobody else can change it (not even this process through another
// socket), a foreign "flush ruleset" passes it by, and it survives the death of
// this process. ErrOwned means that another living
// process has it.
//
// A table that has our chains is renewed in place, so that packets which wait
// in our queues for a successor of a killed instance are not dropped.
func Install(p Params, k Kernel) (*Firewall, error) {
	r, err := Build(p, k)
	if err != nil {
		return nil, err
	}
	f := &Firewall{p: p.clone(), k: k, r: r}
	same := false
	if now, err := readStanding(r.Table); err == nil {
		same, f.stale = now.renewable(r), now.stale(r)
	}
	if same {
		err := f.put(renewBatch)
		if err == nil || errors.Is(err, ErrOwned) {
			return f, err
		}
		// It was made by another version: sets of other types, say.
	}
	if err := f.install(); err != nil {
		return nil, err
	}
	return f, nil
}

// standing is what the kernel has under our table's name: the chains of each
// family, with their hooks.
type standing map[byte]map[string]string

func readStanding(table string) (standing, error) {
	c, err := dialReader()
	if err != nil {
		return nil, err
	}
	defer c.close()
	hooks := []string{"prerouting", "input", "forward", "output", "postrouting"} // NF_INET_PRE_ROUTING, …
	s := standing{unix.NFPROTO_INET: {}, unix.NFPROTO_IPV4: {}, unix.NFPROTO_IPV6: {}}
	err = c.list(unix.NFT_MSG_GETCHAIN, unix.NFPROTO_UNSPEC, nil, func(family byte, a attrs) error {
		if s[family] == nil || a.text(unix.NFTA_CHAIN_TABLE) != table {
			return nil
		}
		has := ""
		if hook, err := parseAttrs(a[unix.NFTA_CHAIN_HOOK]); err == nil && len(hook) > 0 {
			n := hook.uint(unix.NFTA_HOOK_HOOKNUM)
			if int(n) < len(hooks) {
				has = fmt.Sprintf("%s %s %d", a.text(unix.NFTA_CHAIN_TYPE), hooks[n], int32(hook.uint(unix.NFTA_HOOK_PRIORITY)))
			}
		}
		s[family][a.text(unix.NFTA_CHAIN_NAME)] = has
		return nil
	})
	return s, err
}

// same tells whether the table of a family has exactly these chains at the same
// hooks.
func (s standing) same(family byte, list []Chain) bool {
	want := map[string]string{}
	for i := range list {
		ch := &list[i]
		want[ch.Name] = ""
		if ch.Hook != "" {
			kind := "filter"
			if ch.NAT {
				kind = "nat"
			}
			want[ch.Name] = fmt.Sprintf("%s %s %d", kind, ch.Hook, ch.Priority)
		}
	}
	return maps.Equal(want, s[family])
}

// renewable: the table has the chains of r, and each companion that is there
// does too.
func (s standing) renewable(r *Ruleset) bool {
	return s.same(unix.NFPROTO_INET, r.Chains) && !slices.ContainsFunc(r.Companions, func(c Companion) bool {
		return len(s[c.family().nf]) > 0 && !s.same(c.family().nf, c.Chains)
	})
}

// companions are the families in which a table of our name is a companion of
// ours. One that only has the name is somebody else's.
func (s standing) companions() []*ipFamily {
	return slices.DeleteFunc(slices.Clone(families[:]), func(f *ipFamily) bool { return !s.same(f.nf, companionChains()) })
}

// stale are the companions that r does not have.
func (s standing) stale(r *Ruleset) []*ipFamily {
	return slices.DeleteFunc(s.companions(), func(f *ipFamily) bool { return slices.Contains(r.companions(), f) })
}

// Ruleset is what is installed now.
func (f *Firewall) Ruleset() *Ruleset {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.r
}

// install sends the whole table. The caller holds the lock or is the only one.
func (f *Firewall) install() error { return f.put(rulesetBatch) }

func (f *Firewall) put(encode func(*Ruleset, Kernel, ...*ipFamily) (*batch, error)) error {
	b, err := encode(f.withBans(), f.k, f.stale...)
	if err != nil {
		return err
	}
	c, err := f.send(b, f.r.Table)
	if err != nil {
		return err
	}
	f.stale = nil
	if f.k.Owner {
		f.owner = c
		return nil
	}
	f.remember()
	return c.close()
}

// send commits b, which is about table, over the socket that owns it or, if
// there is none, over a new one. The caller closes or keeps the connection that
// it returns. The caller holds the lock or is the only one.
func (f *Firewall) send(b *batch, table string) (c *conn, err error) {
	if c = f.owner; c == nil {
		if c, err = dial(); err != nil {
			return nil, err
		}
	}
	if err := c.send(b); err != nil {
		if c != f.owner {
			c.close()
		}
		return nil, ownedError(table, err)
	}
	return c, nil
}

// remember takes the fingerprint of what has just been committed, for a
// Watcher. A failure leaves one that nothing equals: the next event installs
// again.
func (f *Firewall) remember() {
	if f.seen == "" {
		return
	}
	var err error
	if f.seen, err = fingerprint(f.r); err != nil {
		f.seen = "unknown"
	}
}

// Reinstall sends the whole table again, with counters at zero, after somebody
// removed or changed it.
func (f *Firewall) Reinstall() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return fmt.Errorf("nft: table inet %s: %w", f.r.Table, ErrTableGone)
	}
	return f.install()
}

// Update changes the elements of the sets to those of p, in one transaction;
// sets that stay as they are are not touched, rules and counters never. A p
// that differs in anything but VIPs, Servers, SNIPs, ExceptPorts,
// StrictRPFilter and Shared is refused with ErrNeedsRestart, an invalid one
// too, and nothing has changed then. If somebody removed the table, it is
// installed whole.
func (f *Firewall) Update(p Params) error {
	r, err := Build(p, f.k)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return fmt.Errorf("nft: table inet %s: %w", f.r.Table, ErrTableGone)
	}
	if key := fixedDifference(&f.p, &p); key != "" {
		return fmt.Errorf("nft: a change of %s %w", key, ErrNeedsRestart)
	}
	var changed []Set
	for i := range r.Sets {
		if !slices.EqualFunc(r.Sets[i].Elements, f.r.Sets[i].Elements, func(a, b Element) bool { return a.Text == b.Text }) {
			changed = append(changed, r.Sets[i])
		}
	}
	if len(changed) > 0 {
		b, err := elementsBatch(r.Table, changed)
		if err != nil {
			return err
		}
		if err := f.sendElements(b, r); err != nil {
			return err
		}
	}
	f.p, f.r = p.clone(), r
	f.remember()
	if f.guard != nil {
		return f.guard.Update(p)
	}
	return nil
}

func (f *Firewall) sendElements(b *batch, r *Ruleset) error {
	c := f.owner
	if c == nil {
		var err error
		if c, err = dial(); err != nil {
			return err
		}
		defer c.close()
	}
	err := c.send(b)
	if !errors.Is(err, unix.ENOENT) {
		return ownedError(r.Table, err)
	}
	old := f.r
	f.r = r
	if err := f.install(); err != nil {
		f.r = old
		return err
	}
	return nil
}

// fixedDifference names the configuration key of a difference that set
// elements cannot express.
func fixedDifference(a, b *Params) string {
	switch {
	case a.Table != b.Table:
		return "firewall.table"
	case a.Mark != b.Mark || a.MarkMask != b.MarkMask:
		return "firewall.mark"
	case a.PortFirst != b.PortFirst || a.PortLast != b.PortLast:
		return "source.ports"
	case a.QueueFirst != b.QueueFirst:
		return "queue.first"
	case a.Shards != b.Shards:
		return "queue.shards"
	case a.InspectAll != b.InspectAll:
		return "firewall.inspect"
	case a.SYNToLo != b.SYNToLo:
		return "queue.syn"
	}
	return ""
}

// Remove deletes our table and its companions. It may be called again, and does nothing then, or
// when somebody else has deleted the table.
func (f *Firewall) Remove() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return nil
	}
	c := f.owner
	if c == nil {
		var err error
		if c, err = dial(); err != nil {
			return err
		}
	}
	if _, err := deleteTable(c, f.r.Table, f.r.companions()...); err != nil {
		if c != f.owner {
			c.close()
		}
		return err
	}
	f.gone, f.owner = true, nil
	return c.close()
}

// Leave gives the table up without deleting it: it stays in force, and a
// successor can claim it. The Firewall can do nothing afterwards.
func (f *Firewall) Leave() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.owner
	f.gone, f.owner = true, nil
	if c == nil {
		return nil
	}
	return c.close()
}

// Counters reads all named counters; see the Counter constants for the names.
// ErrTableGone means that somebody removed the table.
func (f *Firewall) Counters() (map[string]Counter, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.owner
	if c == nil {
		var err error
		if c, err = dial(); err != nil {
			return nil, err
		}
		defer c.close()
	}
	return c.counters(f.r.Table)
}

// counters dumps the table's counter objects.
func (c *conn) counters(table string) (map[string]Counter, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_OBJ_TABLE, Data: []byte(table + "\x00")}})
	if err != nil {
		return nil, fmt.Errorf("nft: reading counters: %w", err)
	}
	if err := c.nl.SetReadDeadline(time.Now().Add(ackTimeout)); err != nil {
		return nil, fmt.Errorf("nft: reading counters: %w", err)
	}
	msgs, err := c.nl.Execute(netlink.Message{
		Header: netlink.Header{Type: nftType(unix.NFT_MSG_GETOBJ), Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("nft: %w", ErrPermission)
		}
		return nil, fmt.Errorf("nft: reading counters of table inet %s: %w", table, err)
	}
	out := make(map[string]Counter, len(msgs))
	for _, m := range msgs {
		name, v, err := parseCounter(m.Data)
		if err != nil {
			return nil, fmt.Errorf("nft: reading counters of table inet %s: %w", table, err)
		}
		if name != "" {
			out[name] = v
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("nft: table inet %s: %w", table, ErrTableGone)
	}
	return out, nil
}

// parseCounter reads one NFT_MSG_NEWOBJ; the name is empty when it is not a
// counter.
func parseCounter(data []byte) (name string, v Counter, err error) {
	if len(data) < 4 {
		return "", v, errors.New("short message")
	}
	ad, err := netlink.NewAttributeDecoder(data[4:])
	if err != nil {
		return "", v, err
	}
	ad.ByteOrder = binary.BigEndian
	kind := uint32(unix.NFT_OBJECT_UNSPEC)
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_OBJ_NAME:
			name = ad.String()
		case unix.NFTA_OBJ_TYPE:
			kind = ad.Uint32()
		case unix.NFTA_OBJ_DATA:
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				nad.ByteOrder = binary.BigEndian
				for nad.Next() {
					switch nad.Type() {
					case unix.NFTA_COUNTER_BYTES:
						v.Bytes = nad.Uint64()
					case unix.NFTA_COUNTER_PACKETS:
						v.Packets = nad.Uint64()
					}
				}
				return nad.Err()
			})
		}
	}
	if kind != unix.NFT_OBJECT_COUNTER {
		name = ""
	}
	return name, v, ad.Err()
}

// Cleanup deletes the table, with its companions, that a killed instance left, and says whether there
// was one. It answers ErrOwned while an instance is running on a kernel on which
// tables have owners; elsewhere the caller has to know that none is.
func Cleanup(table string) (found bool, err error) {
	if !validName(table) {
		return false, fmt.Errorf("nft: %q is not a table name", table)
	}
	c, err := dial()
	if err != nil {
		return false, err
	}
	defer c.close()
	now, err := readStanding(table)
	if err != nil {
		return false, err
	}
	return deleteTable(c, table, now.companions()...)
}

func deleteTable(c *conn, table string, companions ...*ipFamily) (found bool, err error) {
	b, err := deleteTableBatch(table, companions...)
	if err != nil {
		return false, err
	}
	switch err := c.send(b); {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT):
		return false, nil
	default:
		return false, ownedError(table, err)
	}
}

// ownedError explains the EPERM of a single step: the right to change the
// firewall is there, this table is somebody else's.
func ownedError(table string, err error) error {
	var be *BatchError
	if errors.As(err, &be) && be.Err == unix.EPERM {
		return fmt.Errorf("nft: table inet %s: %w: stop the instance that runs here, or use another firewall.table", table, ErrOwned)
	}
	return err
}
