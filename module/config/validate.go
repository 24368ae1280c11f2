// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
)

// validator checks what concerns more than one value. What concerns one value
// alone has been checked while it was read.
type validator struct {
	cfg  *Config
	at   map[string]position
	errs Errors
}

// bad reports whether a problem with the key, or with something it is part
// of, was reported before, so that nothing may be concluded from its value.
func (v *validator) bad(key string) bool {
	for ; key != ""; key = parent(key) {
		if v.at[key].bad {
			return true
		}
	}
	return false
}

func parent(key string) string {
	for i := len(key) - 1; i > 0; i-- {
		if key[i] == '.' || key[i] == '[' {
			return key[:i]
		}
	}
	return ""
}

// fail reports a problem with a key.
func (v *validator) fail(key, problem, expected string) {
	if v.bad(key) {
		return
	}
	p, exact := lookup(v.at, key)
	shown := key
	if exact {
		shown = p.key
	} else if up := nearest(v.at, key); up != "" {
		shown = p.key + key[len(up):]
	}
	v.errs = append(v.errs, &Error{File: p.file, Line: p.line, Column: p.column, Key: shown, Problem: problem, Expected: expected, order: p.order})
}

func nearest(at map[string]position, key string) string {
	for key = parent(key); key != ""; key = parent(key) {
		if _, ok := at[key]; ok {
			return key
		}
	}
	return ""
}

// where names the place of a key for another key's message.
func (v *validator) where(key string) string {
	p, _ := lookup(v.at, key)
	switch {
	case p.line > 0:
		return fmt.Sprintf("%s:%d", p.file, p.line)
	case p.file != "":
		return p.file
	}
	return "the defaults"
}

// vip is a VIP with its place.
type vip struct {
	key  string
	farm string
}

func (v *validator) validate() {
	v.duration("stop_timeout", v.cfg.StopTimeout)
	v.source()
	v.queue()
	v.plugins()
	vips := v.vips()
	names := map[string]string{}
	for i := range v.cfg.Farms {
		key := fmt.Sprintf("farms[%d]", i)
		v.unique(names, key+".name", v.cfg.Farms[i].Name, "farm")
		v.farm(&v.cfg.Farms[i], key, vips)
	}
	v.metrics(vips)
	if p := v.cfg.Log.Access.Path; p != "" && !filepath.IsAbs(p) {
		v.fail("log.access.path", fmt.Sprintf("%q is not an absolute path", p), "an absolute path")
	}
	v.unsupported()
}

// unique reports a name that was given before, with both places.
func (v *validator) unique(seen map[string]string, key, name, what string) {
	if name == "" {
		v.fail(key, "the "+what+" has no name", schemaAt(key).expected())
		return
	}
	if first, ok := seen[name]; ok {
		v.fail(key, fmt.Sprintf("the %s %q is given twice", what, name), "another name (the first is at "+v.where(first)+")")
		return
	}
	seen[name] = key
}

// schemaAt returns the field of a key path with indexes.
func schemaAt(key string) *field {
	f, word := schema, ""
	step := func() {
		if word != "" && f != nil {
			f = f.child(word)
		}
		word = ""
	}
	for i := 0; i < len(key); i++ {
		switch c := key[i]; c {
		case '.':
			step()
		case '[':
			step()
			for key[i] != ']' {
				i++
			}
		default:
			word += string(c)
		}
	}
	step()
	return f
}

// longestDuration bounds every time span: timers count nanoseconds, and a
// longer one is a slip of the unit.
const longestDuration = Duration(366 * 24 * 3600 * 1e9)

func (v *validator) duration(key string, d Duration) {
	if d > longestDuration {
		v.fail(key, d.String()+" is too long", "at most a year")
	}
}

func (v *validator) source() {
	src := &v.cfg.Source
	seen := map[netip.Addr]bool{}
	for i, a := range src.Addresses {
		key := fmt.Sprintf("source.addresses[%d]", i)
		v.unicast(key, a)
		if seen[a] {
			v.fail(key, a.String()+" is given twice", "every SNIP once")
		}
		seen[a] = true
	}
	switch shards := v.cfg.Queue.Shards; {
	case src.Ports.Low < 1024:
		v.fail("source.ports", fmt.Sprintf("the range %s begins below 1024", src.Ports), "a range inside 1024-65535")
	case src.Ports.Size() < 2*minPortsPerShard:
		v.fail("source.ports", fmt.Sprintf("the range %s has only %d ports", src.Ports, src.Ports.Size()), fmt.Sprintf("at least %d ports", 2*minPortsPerShard))
	case src.Ports.Size() < minPortsPerShard*int(shards):
		v.fail("source.ports", fmt.Sprintf("the range %s has only %d ports for %d shards", src.Ports, src.Ports.Size(), shards),
			fmt.Sprintf("at least %d ports (%d per shard), or fewer queue.shards", minPortsPerShard*int(shards), minPortsPerShard))
	}
}

func (v *validator) unicast(key string, a netip.Addr) {
	if !a.IsValid() {
		return
	}
	if err := checkUnicast(a); err != nil {
		e := asValueError(err, a.String(), expectAddr)
		v.fail(key, e.problem, e.expected)
	}
}

// queue checks that the numbers of all queues fit into 16 bits. For auto the
// number of shards follows the room (ShardCount).
func (v *validator) queue() {
	q := v.cfg.Queue
	if last := q.First + 2 + int(q.Shards); last > 65535 {
		v.fail("queue.first", fmt.Sprintf("queues from %d on for %d shards and two more go beyond 65535", q.First, q.Shards),
			fmt.Sprintf("at most %d", 65535-2-int(q.Shards)))
	}
}

func (v *validator) plugins() {
	names := map[string]string{}
	for i := range v.cfg.Plugins {
		p := &v.cfg.Plugins[i]
		key := fmt.Sprintf("plugins[%d]", i)
		v.unique(names, key+".name", p.Name, "plugin")
		v.duration(key+".start_timeout", p.StartTimeout)
		v.duration(key+".expiry", p.Expiry)
		for j, w := range p.Command {
			if j == 0 && w == "" {
				v.fail(key+".command[0]", "the program is empty", "a name or a path")
			}
		}
	}
}

// vips checks the VIPs of all farms and returns them with their places.
func (v *validator) vips() map[netip.AddrPort]vip {
	out := map[netip.AddrPort]vip{}
	for i := range v.cfg.Farms {
		f := &v.cfg.Farms[i]
		for j, ap := range f.Listen {
			key := fmt.Sprintf("farms[%d].listen[%d]", i, j)
			v.unicast(key, ap.Addr())
			if first, ok := out[ap]; ok {
				v.fail(key, fmt.Sprintf("the VIP %s is given twice", ap), fmt.Sprintf("every VIP in one farm (farm %q has it at %s)", first.farm, v.where(first.key)))
				continue
			}
			out[ap] = vip{key, f.Name}
			if v.isSourcePort(ap) {
				v.fail(key, fmt.Sprintf("the VIP %s is a SNIP with a port inside source.ports (%s)", ap, v.cfg.Source.Ports), "a port outside that range, or another address")
			}
		}
	}
	return out
}

// isSourcePort reports whether the engine uses this address and port as the
// source of server connections.
func (v *validator) isSourcePort(ap netip.AddrPort) bool {
	return slices.Contains(v.cfg.Source.Addresses, ap.Addr()) && v.cfg.Source.Ports.Contains(ap.Port())
}

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func (v *validator) farm(f *Farm, key string, vips map[netip.AddrPort]vip) {
	if len(f.Listen) == 0 {
		v.fail(key+".listen", "the farm has no VIP", expectAddrPort)
	}
	if len(f.Servers) == 0 {
		v.fail(key+".servers", "the farm has no server", "at least one server with a name and an address")
	}
	v.servers(f, key, vips)
	v.family(f, key)
	v.policies(f, key)
	v.pool(&f.Pool, key+".pool")
	v.duration(key+".timeouts.connect", f.Timeouts.Connect)
	v.duration(key+".timeouts.head", f.Timeouts.Head)
	v.duration(key+".timeouts.body", f.Timeouts.Body)
	v.duration(key+".timeouts.idle", f.Timeouts.Idle)
	v.duration(key+".timeouts.tunnel", f.Timeouts.Tunnel)
	v.duration(key+".timeouts.response", f.Timeouts.Response)
	v.duration(key+".timeouts.drain", f.Timeouts.Drain)
	v.limits(&f.Limits, key+".limits")
}

// limits checks that the sizes fit into what the scanners count with, and that
// what a client may have to hold stays bounded.
func (v *validator) limits(l *Limits, key string) {
	for _, s := range []struct {
		name      string
		size, max ByteSize
	}{
		{"head", l.Head, 1 << 20}, {"target", l.Target, 65535},
		{"chunk_extension", l.ChunkExtension, 65535}, {"trailers", l.Trailers, 1 << 20},
	} {
		if s.size > s.max {
			v.fail(key+"."+s.name, s.size.String()+" is too large", "at most "+s.max.String())
		}
	}
	if _, written := lookup(v.at, key+".target"); !written {
		l.Target = min(l.Target, l.Head-1)
	}
	if l.Target >= l.Head {
		v.fail(key+".target", fmt.Sprintf("a target of %s does not fit into a head of %s", l.Target, l.Head), "less than limits.head")
	}
}

func (v *validator) servers(f *Farm, key string, vips map[netip.AddrPort]vip) {
	names := map[string]string{}
	addrs := map[netip.AddrPort]string{}
	for i := range f.Servers {
		s := &f.Servers[i]
		at := fmt.Sprintf("%s.servers[%d]", key, i)
		v.unique(names, at+".name", s.Name, "server")
		if !s.Address.IsValid() {
			v.fail(at+".address", "the server has no address", expectAddrPort)
			continue
		}
		v.unicast(at+".address", s.Address.Addr())
		if first, ok := addrs[s.Address]; ok {
			v.fail(at+".address", fmt.Sprintf("%s is given twice in this farm", s.Address), "every server once (the first is at "+v.where(first)+"); a larger share is a weight")
		} else {
			addrs[s.Address] = at + ".address"
		}
		// In its own farm a server may be its own VIP, behind the router.
		if vip, ok := vips[s.Address]; ok && vip.farm != f.Name {
			v.fail(at+".address", fmt.Sprintf("%s is the VIP of farm %q", s.Address, vip.farm), "a server's own address (the VIP is at "+v.where(vip.key)+")")
		}
		if v.isSourcePort(s.Address) {
			v.fail(at+".address", fmt.Sprintf("%s is a SNIP with a port inside source.ports (%s)", s.Address, v.cfg.Source.Ports), "a port outside that range")
		}
	}
}

// family checks that the whole farm has one address family and that the
// family has a SNIP: nothing translates between families.
func (v *validator) family(f *Farm, key string) {
	family, first := "", ""
	check := func(key string, ap netip.AddrPort) {
		switch {
		case !ap.IsValid():
		case family == "":
			family, first = familyOf(ap.Addr()), key
		case family != familyOf(ap.Addr()):
			v.fail(key, fmt.Sprintf("%s is %s in a farm of %s", ap.Addr(), familyOf(ap.Addr()), family),
				fmt.Sprintf("%s like %s; nothing translates between families, so make a farm for each", family, v.where(first)))
		}
	}
	for i, ap := range f.Listen {
		check(fmt.Sprintf("%s.listen[%d]", key, i), ap)
	}
	for i := range f.Servers {
		check(fmt.Sprintf("%s.servers[%d].address", key, i), f.Servers[i].Address)
	}
	if family == "" || v.bad("source.addresses") {
		return
	}
	for _, a := range v.cfg.Source.Addresses {
		if familyOf(a) == family {
			return
		}
	}
	v.fail(key+".listen", fmt.Sprintf("farm %q is %s, and source.addresses has no %s address", f.Name, family, family),
		fmt.Sprintf("an %s SNIP in source.addresses", family))
}

func (v *validator) policies(f *Farm, key string) {
	var known []string
	for i := range v.cfg.Plugins {
		known = append(known, v.cfg.Plugins[i].Name)
	}
	for _, b := range builtin {
		if !slices.Contains(known, b) {
			known = append(known, b)
		}
	}
	seen := map[string]string{}
	for i, p := range f.Policies {
		at := fmt.Sprintf("%s.policies[%d]", key, i)
		use := at + ".use"
		if _, exact := lookup(v.at, use); !exact {
			use = at
		}
		switch first, twice := seen[p.Use]; {
		case p.Use == "":
			v.fail(use, "the policy has no plugin", "the name of a plugin")
		case !slices.Contains(known, p.Use):
			before := len(v.errs)
			v.fail(use, fmt.Sprintf("there is no plugin %q", p.Use), oneOf(known)+", or an entry in plugins")
			if len(v.errs) > before {
				v.errs[before].Hint = didYouMean(p.Use, known)
			}
		case twice:
			v.fail(use, fmt.Sprintf("the policy %q is used twice in this farm", p.Use), "every plugin once per farm (the first is at "+v.where(first)+")")
		default:
			seen[p.Use] = use
		}
	}
}

// pool checks that the limits can hold together. 0 is no limit. A max_idle
// that nobody wrote follows max_connections down.
func (v *validator) pool(p *Pool, key string) {
	if _, written := lookup(v.at, key+".max_idle"); !written && p.MaxConnections != 0 {
		p.MaxIdle = min(p.MaxIdle, p.MaxConnections)
	}
	if p.MaxIdle != 0 && p.MinIdle > p.MaxIdle {
		v.fail(key+".min_idle", fmt.Sprintf("min_idle %d is above max_idle %d", p.MinIdle, p.MaxIdle), "min_idle at most max_idle")
	}
	if p.MaxConnections != 0 {
		switch {
		case p.MinIdle > p.MaxConnections:
			v.fail(key+".min_idle", fmt.Sprintf("min_idle %d is above max_connections %d", p.MinIdle, p.MaxConnections), "min_idle at most max_connections")
		case p.MaxIdle > p.MaxConnections:
			v.fail(key+".max_idle", fmt.Sprintf("max_idle %d is above max_connections %d", p.MaxIdle, p.MaxConnections), "max_idle at most max_connections")
		}
	}
	v.duration(key+".idle_timeout", p.IdleTimeout)
	v.duration(key+".max_age", p.MaxAge)
	v.duration(key+".wait_timeout", p.WaitTimeout)
	v.duration(key+".drain_timeout", p.DrainTimeout)
}

func (v *validator) metrics(vips map[netip.AddrPort]vip) {
	m := v.cfg.Admin.Metrics
	if !m.IsValid() {
		return
	}
	if m.Addr().IsMulticast() || m.Addr().IsLinkLocalUnicast() {
		v.unicast("admin.metrics", m.Addr())
	}
	first, taken := vips[m]
	if m.Addr().IsUnspecified() {
		for ap, w := range vips {
			if ap.Port() == m.Port() && (!taken || w.key < first.key) {
				first, taken = w, true
			}
		}
	}
	if taken {
		v.fail("admin.metrics", fmt.Sprintf("%s is taken by the VIP of farm %q", m, first.farm), "an address or port of its own (the VIP is at "+v.where(first.key)+")")
	}
	if v.isSourcePort(m) {
		v.fail("admin.metrics", fmt.Sprintf("%s is a SNIP with a port inside source.ports (%s)", m, v.cfg.Source.Ports), "a port outside that range")
	}
}

// unsupported refuses settings that the schema has and the engine has not.
func (v *validator) unsupported() {
	for _, u := range []struct {
		key, value, expected string
		set                  bool
	}{} {
		if u.set {
			v.fail(u.key, fmt.Sprintf("%q is not supported in this version", u.value), u.expected)
		}
	}
}
