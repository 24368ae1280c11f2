// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Message types and flags that google/nftables 0.3.0 does not know.
const (
	msgDestroyTable = 26  // NFT_MSG_DESTROYTABLE, Linux 6.3
	tableDormant    = 0x1 // NFT_TABLE_F_DORMANT
	tableOwner      = 0x2 // NFT_TABLE_F_OWNER, Linux 5.12
	tablePersist    = 0x4 // NFT_TABLE_F_PERSIST, Linux 6.9

	// elementsPerMessage keeps the element list, whose length is a 16-bit
	// attribute length, below 64 KiB with keys of 20 bytes.
	elementsPerMessage = 1000

	flagEcho = 0x8 // NLM_F_ECHO
)

func nftType(msg int) netlink.HeaderType {
	return netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg)
}

// A batch is one transaction: messages in order, each with the words that name
// it in an error. Sequence numbers and sender are filled in when it is sent.
type batch struct {
	messages []netlink.Message
	what     []string
}

// encoder marshals with google/nftables. A marshalling error poisons its Conn,
// so every batch has an encoder, and every encoder a Conn, of its own.
type encoder struct {
	conn   *nftables.Conn
	table  *nftables.Table
	what   []string
	setID  uint32
	host   []int // indices of messages of maps with keys in the machine's byte order
	gone   []int // of messages that delete a table which need not be there
	owned  []int // of messages that claim a table for the sending socket
	caught []netlink.Message
	err    error
}

func newEncoder(table string) (*encoder, error) {
	e := &encoder{table: &nftables.Table{Name: table, Family: nftables.TableFamilyINet}}
	// The library sends by itself, asking for an echo of every rule and
	// mistaking several packets of echoes for missing acknowledgments; nor can
	// it set table flags. So its socket is a recorder that acknowledges all,
	// and send in transact.go does the sending.
	ack := netlink.Message{Header: netlink.Header{Type: netlink.Error}, Data: make([]byte, 20)}
	conn, err := nftables.New(nftables.WithTestDial(func(req []netlink.Message) ([]netlink.Message, error) {
		if req != nil {
			e.caught = append(e.caught, req...)
			return nil, nil
		}
		return []netlink.Message{ack}, nil
	}))
	if err != nil {
		return nil, fmt.Errorf("nft: %w", err)
	}
	e.conn = conn
	return e, nil
}

// did notes what the last n messages are for.
func (e *encoder) did(n int, format string, a ...any) {
	s := fmt.Sprintf(format, a...)
	for range n {
		e.what = append(e.what, s)
	}
}

func (e *encoder) fail(err error) {
	if e.err == nil && err != nil {
		e.err = err
	}
}

// batch ends the encoding.
func (e *encoder) batch() (*batch, error) {
	if e.err != nil {
		return nil, fmt.Errorf("nft: encoding table %s: %w", e.table.Name, e.err)
	}
	if err := e.conn.Flush(); err != nil {
		return nil, fmt.Errorf("nft: encoding table %s: %w", e.table.Name, err)
	}
	if len(e.caught) < 2 || len(e.caught)-2 != len(e.what) {
		return nil, fmt.Errorf("nft: encoding table %s: %d messages for %d steps", e.table.Name, len(e.caught), len(e.what))
	}
	b := &batch{what: e.what, messages: e.caught[1 : len(e.caught)-1]} // without batch begin and end
	for i := range b.messages {
		h := &b.messages[i].Header
		h.Sequence, h.PID, h.Length = 0, 0, 0
		h.Flags &^= flagEcho
	}
	for _, i := range e.gone {
		b.messages[i].Header.Type = nftType(msgDestroyTable)
	}
	for _, i := range e.owned {
		// Every table of a batch has the same name.
		if err := setTableFlags(&b.messages[i], e.table.Name, tableOwner|tablePersist); err != nil {
			return nil, err
		}
	}
	for _, i := range e.host {
		if err := setKeyOrder(&b.messages[i]); err != nil {
			return nil, fmt.Errorf("nft: encoding table %s: %w", e.table.Name, err)
		}
	}
	return b, nil
}

// setKeyOrder tells nft, in the user data of a NEWSET message, that the keys
// are in the machine's byte order. The library says the opposite for every
// anonymous map: the kernel does not care, but a listing would show wrong keys,
// and a saved listing restore them.
func setKeyOrder(m *netlink.Message) error {
	ad, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return err
	}
	var attrs []netlink.Attribute
	for ad.Next() {
		a := netlink.Attribute{Type: ad.Type() | ad.TypeFlags(), Data: ad.Bytes()}
		if ad.Type() == unix.NFTA_SET_USERDATA {
			a.Data = userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, 1)
		}
		attrs = append(attrs, a)
	}
	if err := ad.Err(); err != nil {
		return err
	}
	b, err := netlink.MarshalAttributes(attrs)
	m.Data = append(m.Data[:4:4], b...)
	return err
}

// in goes on with the table of the same name in another family.
func (e *encoder) in(family byte) {
	e.table = &nftables.Table{Name: e.table.Name, Family: nftables.TableFamily(family)}
}

func (e *encoder) name() string { return familyWords[byte(e.table.Family)] + " " + e.table.Name }

// claim adds the table, which may be there already; with k.Owner it is the
// sending socket's from then on.
func (e *encoder) claim(verb string, k Kernel) {
	if k.Owner {
		e.owned = append(e.owned, len(e.what))
	}
	e.conn.AddTable(e.table)
	e.did(1, "%s table %s", verb, e.name())
}

// removeTable removes the table, whoever made it, if it is there. The library
// cannot say "destroy"; batch turns the message into it.
func (e *encoder) removeTable(destroy bool) {
	if destroy {
		e.gone = append(e.gone, len(e.what))
		e.conn.DelTable(e.table)
		e.did(1, "destroy table %s", e.name())
		return
	}
	// Adding what may exist makes the deletion succeed in every case.
	e.conn.AddTable(e.table)
	e.did(1, "add table %s", e.name())
	e.conn.DelTable(e.table)
	e.did(1, "delete table %s", e.name())
}

// rulesetBatch is the whole table and its companions, replacing what stands
// under their names, and removes the stale companions. With k.Destroy the old
// table goes by one message that does not mind its absence; with k.Owner the
// new ones are owned by the sending socket and survive it.
func rulesetBatch(r *Ruleset, k Kernel, stale ...*ipFamily) (*batch, error) {
	e, err := newEncoder(r.Table)
	if err != nil {
		return nil, err
	}
	e.removeTable(k.Destroy)
	e.claim("add", k)
	e.ruleset(r)
	for i := range r.Companions {
		e.in(r.Companions[i].family().nf)
		e.removeTable(k.Destroy)
		e.claim("add", k)
		e.chains(r.Companions[i].Chains)
	}
	e.stale(stale, k)
	return e.batch()
}

// renewBatch is the same for tables that have the same chains already: they,
// their hooks, the named counters and their values stay, and with them the
// packets that wait in our queues, which the kernel drops with the hook that
// queued them or any other. All else is emptied and filled again. A companion
// that is not there is made.
func renewBatch(r *Ruleset, k Kernel, stale ...*ipFamily) (*batch, error) {
	e, err := newEncoder(r.Table)
	if err != nil {
		return nil, err
	}
	e.renew(k)
	for i := range r.Sets {
		if r.Sets[i].Timeout {
			continue // what holds for its time goes on
		}
		e.conn.FlushSet(&nftables.Set{Table: e.table, Name: r.Sets[i].Name})
		e.did(1, "flush set %s", r.Sets[i].Name)
	}
	e.ruleset(r)
	for i := range r.Companions {
		e.in(r.Companions[i].family().nf)
		e.renew(k)
		e.chains(r.Companions[i].Chains)
	}
	e.stale(stale, k)
	return e.batch()
}

// renew claims the table and takes the rules out of its chains.
func (e *encoder) renew(k Kernel) {
	e.claim("claim", k)
	e.conn.FlushTable(e.table)
	e.did(1, "flush table %s", e.name())
}

// stale removes companions that the ruleset does not have any more.
func (e *encoder) stale(list []*ipFamily, k Kernel) {
	for _, f := range list {
		e.in(f.nf)
		e.removeTable(k.Destroy)
	}
}

// setTableFlags rewrites the body of a NEWTABLE message with these flags.
func setTableFlags(m *netlink.Message, table string, flags uint32) error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(table + "\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binaryutil.BigEndian.PutUint32(flags)},
	})
	if err != nil {
		return fmt.Errorf("nft: encoding table %s: %w", table, err)
	}
	m.Data = append(m.Data[:4:4], attrs...) // behind struct nfgenmsg
	return nil
}

// deleteTableBatch removes the table, which must be there; or, where it has
// companions, these and the table, whatever of them is there.
func deleteTableBatch(table string, companions ...*ipFamily) (*batch, error) {
	e, err := newEncoder(table)
	if err != nil {
		return nil, err
	}
	if len(companions) == 0 {
		e.conn.DelTable(e.table)
		e.did(1, "delete table inet %s", table)
		return e.batch()
	}
	// A kernel on which companions were made knows "destroy".
	k := Kernel{Destroy: true}
	e.removeTable(k.Destroy)
	e.stale(companions, k)
	return e.batch()
}

// elementsBatch empties and refills the sets: in one transaction that is one
// step for every packet, and needs no knowledge of what stands there now.
func elementsBatch(table string, sets []Set) (*batch, error) {
	e, err := newEncoder(table)
	if err != nil {
		return nil, err
	}
	for i := range sets {
		s := e.namedSet(&sets[i])
		e.conn.FlushSet(s)
		e.did(1, "flush set %s", s.Name)
		e.elements(s, sets[i].Elements)
	}
	return e.batch()
}

func (e *encoder) ruleset(r *Ruleset) {
	for _, name := range r.Counters {
		e.conn.AddObj(&nftables.NamedObj{Table: e.table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
		e.did(1, "add counter %s", name)
	}
	for i := range r.Sets {
		s := e.namedSet(&r.Sets[i])
		e.fail(e.conn.AddSet(s, nil))
		e.did(1, "add set %s", s.Name)
		e.elements(s, r.Sets[i].Elements)
	}
	e.chains(r.Chains)
}

func (e *encoder) chains(list []Chain) {
	chains := make(map[string]*nftables.Chain, len(list))
	for i := range list {
		c := &list[i]
		chains[c.Name] = e.conn.AddChain(e.chain(c))
		e.did(1, "add chain %s", c.Name)
	}
	for i := range list {
		c := &list[i]
		for _, rule := range c.Rules {
			e.rule(chains[c.Name], rule)
		}
	}
}

func (e *encoder) chain(c *Chain) *nftables.Chain {
	out := &nftables.Chain{Name: c.Name, Table: e.table}
	if c.Hook == "" {
		return out
	}
	hooks := map[string]*nftables.ChainHook{
		"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput,
		"forward": nftables.ChainHookForward, "output": nftables.ChainHookOutput,
		"postrouting": nftables.ChainHookPostrouting,
	}
	hook, ok := hooks[c.Hook]
	if !ok {
		e.fail(fmt.Errorf("chain %s: unknown hook %q", c.Name, c.Hook))
		return out
	}
	accept := nftables.ChainPolicyAccept
	out.Hooknum, out.Priority = hook, nftables.ChainPriorityRef(nftables.ChainPriority(c.Priority))
	out.Type, out.Policy = nftables.ChainTypeFilter, &accept
	if c.NAT {
		out.Type = nftables.ChainTypeNAT
	}
	return out
}

var setTypes = map[SetType]nftables.SetDatatype{
	SetAddrPort4: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService),
	SetAddrPort6: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService),
	SetAddr4:     nftables.TypeIPAddr,
	SetAddr6:     nftables.TypeIP6Addr,
	SetPort:      nftables.TypeInetService,
	SetIfname:    nftables.TypeIFName,
}

// nextID numbers the sets within one batch. The library would number them
// within the process, and the same ruleset would have other bytes each time.
func (e *encoder) nextID() uint32 { e.setID++; return e.setID }

func (e *encoder) namedSet(s *Set) *nftables.Set {
	t, ok := setTypes[s.Type]
	if !ok {
		e.fail(fmt.Errorf("set %s: unknown type %q", s.Name, s.Type))
	}
	order := binaryutil.BigEndian
	if s.Type == SetIfname {
		order = binaryutil.NativeEndian
	}
	return &nftables.Set{Table: e.table, ID: e.nextID(), Name: s.Name, KeyType: t, KeyByteOrder: order, HasTimeout: s.Timeout}
}

func (e *encoder) elements(s *nftables.Set, all []Element) {
	for len(all) > 0 {
		n := min(len(all), elementsPerMessage)
		part := make([]nftables.SetElement, n)
		for i := range part {
			part[i].Key, part[i].Timeout = all[i].key, all[i].timeout
		}
		e.fail(e.conn.SetAddElements(s, part))
		e.did(1, "add %d elements to set %s", n, s.Name)
		all = all[n:]
	}
}

func (e *encoder) deleteElements(s *nftables.Set, all []Element) {
	for len(all) > 0 {
		n := min(len(all), elementsPerMessage)
		part := make([]nftables.SetElement, n)
		for i := range part {
			part[i].Key = all[i].key
		}
		e.fail(e.conn.SetDeleteElements(s, part))
		e.did(1, "delete %d elements of set %s", n, s.Name)
		all = all[n:]
	}
}

func (e *encoder) rule(c *nftables.Chain, r Rule) {
	out := &nftables.Rule{Table: e.table, Chain: c}
	var nf, l4 bool
	for _, t := range r.terms {
		if t.nf != 0 && !nf {
			out.Exprs = append(out.Exprs, nfprotoExprs(t.nf)...)
			nf = true
		}
		if t.l4 != 0 && !l4 {
			out.Exprs = append(out.Exprs, l4protoExprs(t.l4)...)
			l4 = true
		}
		out.Exprs = append(out.Exprs, t.exprs...)
		switch {
		case t.vmap != nil:
			s := e.verdictMap(t.vmap)
			out.Exprs = append(out.Exprs, &expr.Lookup{SourceRegister: reg1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetID: s.ID, SetName: s.Name})
		case t.set != nil:
			s := e.anonSet(t.set)
			out.Exprs = append(out.Exprs, &expr.Lookup{SourceRegister: reg1, SetID: s.ID, SetName: s.Name})
		}
	}
	e.conn.AddRule(out)
	e.did(1, "add rule to chain %s: %s", c.Name, r.Text())
}

func (e *encoder) verdictMap(m *verdictMap) *nftables.Set {
	s := &nftables.Set{
		Table: e.table, ID: e.nextID(), Name: "__map%d", Anonymous: true, Constant: true, IsMap: true, Interval: m.interval,
		KeyType: nftables.TypeInteger, DataType: nftables.TypeVerdict,
	}
	var el []nftables.SetElement
	to := func(chain string) *expr.Verdict { return &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain} }
	if !m.interval {
		for _, g := range m.goTo {
			el = append(el, nftables.SetElement{Key: native32(g.lo), VerdictData: to(g.chain)})
		}
	} else {
		// An interval map is a list of starts; an end marks where nothing
		// follows. The intervals are sorted and touch each other.
		s.KeyType = nftables.TypeInetService
		if m.goTo[0].lo > 0 {
			el = append(el, nftables.SetElement{Key: big16(0), IntervalEnd: true})
		}
		for _, g := range m.goTo {
			el = append(el, nftables.SetElement{Key: big16(uint16(g.lo)), VerdictData: to(g.chain)})
		}
		if hi := m.goTo[len(m.goTo)-1].hi; hi < 1<<16-1 {
			el = append(el, nftables.SetElement{Key: big16(uint16(hi + 1)), IntervalEnd: true})
		}
	}
	if !m.interval {
		e.host = append(e.host, len(e.what))
	}
	e.fail(e.conn.AddSet(s, el))
	e.did(2, "add map of %d shards", len(m.goTo))
	return s
}

func (e *encoder) anonSet(a *anonSet) *nftables.Set {
	s := &nftables.Set{
		Table: e.table, ID: e.nextID(), Name: "__set%d", Anonymous: true, Constant: true, KeyType: nftables.TypeICMPType,
	}
	if a.icmp6 {
		s.KeyType = nftables.TypeICMP6Type
	}
	el := make([]nftables.SetElement, len(a.keys))
	for i, k := range a.keys {
		el[i].Key = []byte{k}
	}
	e.fail(e.conn.AddSet(s, el))
	e.did(2, "add set of %d ICMP types", len(a.keys))
	return s
}
