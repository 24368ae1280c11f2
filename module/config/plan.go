// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Class says how a running instance takes a change over.
type Class string

// The classes, from the mildest on.
const (
	Hot     Class = "hot"     // at once; established exchanges go on as they began
	Drain   Class = "drain"   // nothing new goes there, what runs may finish
	Restart Class = "restart" // not before the next start
)

// Action says what happened to a key.
type Action string

// The actions.
const (
	Added   Action = "added"
	Removed Action = "removed"
	Changed Action = "changed"
)

// Change is one difference between two configurations.
type Change struct {
	Action Action `json:"action"`
	Class  Class  `json:"class"`
	// Path is the key path with names in place of indexes:
	// farms[web].servers[s2].weight.
	Path string `json:"path"`
	From string `json:"from,omitempty"` // as one would write it; secrets are hidden
	To   string `json:"to,omitempty"`
	// File and Line are where the new value stands, or where a removed one
	// stood; empty for a default.
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
}

// String returns the change as one line of a plan.
func (c Change) String() string {
	sign := map[Action]string{Added: "+", Removed: "-", Changed: "~"}[c.Action]
	s := sign + " " + c.Path
	switch {
	case c.Action == Changed:
		s += ": " + quoteEmpty(c.From) + " -> " + quoteEmpty(c.To)
	case c.From+c.To != "":
		s += ": " + c.From + c.To
	}
	return s
}

func quoteEmpty(s string) string {
	if s == "" {
		return `""`
	}
	return s
}

// Plan is what a reload would do: every difference, in the order of the schema.
type Plan []Change

// Of returns the changes of one class.
func (p Plan) Of(class Class) Plan {
	var out Plan
	for _, c := range p {
		if c.Class == class {
			out = append(out, c)
		}
	}
	return out
}

// restartKeys are the key paths, with all below them, that a running instance
// cannot change. Their doc strings say so too.
var restartKeys = [...]string{
	"runtime_dir", "source", "queue", "admin", "firewall.table", "firewall.mark", "firewall.inspect", "firewall.owned",
}

// drainKeys are the list elements whose removal lets connections finish.
var drainKeys = [...]string{"farms[]", "farms[].listen[]", "farms[].servers[]"}

func classOf(path string, action Action) Class {
	for _, k := range restartKeys {
		if rest, ok := strings.CutPrefix(path, k); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return Restart
		}
	}
	// A server at another address is another server.
	if action == Removed && slices.Contains(drainKeys[:], path) || path == "farms[].servers[].address" {
		return Drain
	}
	return Hot
}

// Compare returns what changes when next takes the place of now.
func Compare(now, next *Config) Plan {
	w := planner{now: now, next: next}
	w.section(schema, reflect.ValueOf(now).Elem(), reflect.ValueOf(next).Elem(), place{})
	return w.plan
}

// WithRestartKeys returns next with those values of now that only a restart
// can change: what a running instance makes of next.
func WithRestartKeys(now, next *Config) *Config {
	c := *next
	for _, key := range restartKeys {
		f, from, to := schema, reflect.ValueOf(now).Elem(), reflect.ValueOf(&c).Elem()
		for word := range strings.SplitSeq(key, ".") {
			f = f.child(word)
			from, to = from.Field(f.index), to.Field(f.index)
		}
		to.Set(from)
	}
	return &c
}

// place is where the walk stands: the path for people, and the key paths in
// the two configurations.
type place struct{ path, now, next string }

func (p place) key(name string) place {
	return place{join(p.path, name), join(p.now, name), join(p.next, name)}
}

func (p place) element(name string, now, next int) place {
	return place{fmt.Sprintf("%s[%s]", p.path, name), fmt.Sprintf("%s[%d]", p.now, now), fmt.Sprintf("%s[%d]", p.next, next)}
}

type planner struct {
	now, next *Config
	plan      Plan
}

func (w *planner) add(f *field, action Action, at place, from, to string) {
	c := Change{Action: action, Class: classOf(f.path, action), Path: at.path, From: from, To: to}
	if action == Removed {
		c.File, c.Line = w.now.Where(at.now)
	} else {
		c.File, c.Line = w.next.Where(at.next)
	}
	w.plan = append(w.plan, c)
}

func (w *planner) section(f *field, a, b reflect.Value, at place) {
	for _, c := range f.fields {
		w.value(c, a.Field(c.index), b.Field(c.index), at.key(c.name))
	}
}

func (w *planner) value(f *field, a, b reflect.Value, at place) {
	switch {
	case f.kind == kindSection:
		w.section(f, a, b, at)
	case f.kind == kindFree:
		w.free(f, a.Interface().(map[string]any), b.Interface().(map[string]any), at)
	case f.kind == kindList && f.elem.kind == kindSection:
		w.named(f, a, b, at)
	case f.kind == kindList && (f.elem.typ == typeAddr || f.elem.typ == typeAddrPort):
		w.set(f, a, b, at)
	case f.kind == kindList && a.Len() == 0 && b.Len() == 0: // none is none, however it is written
	case !reflect.DeepEqual(a.Interface(), b.Interface()):
		w.add(f, Changed, at, written(f, a), written(f, b))
	}
}

// named compares two lists of sections by the names of their elements.
func (w *planner) named(f *field, a, b reflect.Value, at place) {
	key := f.elem.fields[0] // name, or use
	index := func(l reflect.Value) map[string]int {
		m := make(map[string]int, l.Len())
		for i := range l.Len() {
			m[l.Index(i).Field(key.index).String()] = i
		}
		return m
	}
	inA, inB := index(a), index(b)
	var kept [2][]string
	for i := range a.Len() {
		name := a.Index(i).Field(key.index).String()
		if _, ok := inB[name]; ok {
			kept[0] = append(kept[0], name)
		} else if !implied(a.Index(i)) {
			w.add(f.elem, Removed, at.element(name, i, i), "", "")
		}
	}
	for i := range b.Len() {
		name := b.Index(i).Field(key.index).String()
		j, ok := inA[name]
		switch {
		case ok:
			kept[1] = append(kept[1], name)
			w.section(f.elem, a.Index(j), b.Index(i), at.element(name, j, i))
		case !implied(b.Index(i)):
			w.add(f.elem, Added, at.element(name, i, i), "", summaryOf(b.Index(i)))
		}
	}
	// Only policies are asked in an order that matters.
	if f.elem.typ == typePolicyUse && !slices.Equal(kept[0], kept[1]) {
		w.add(f, Changed, at, strings.Join(kept[0], ", "), strings.Join(kept[1], ", "))
	}
}

func implied(v reflect.Value) bool {
	p, ok := v.Interface().(Plugin)
	return ok && p.Implied
}

// summaryOf says in a few words what an added element is.
func summaryOf(v reflect.Value) string {
	switch e := v.Interface().(type) {
	case Farm:
		var l []string
		for _, ap := range e.Listen {
			l = append(l, ap.String())
		}
		word := "servers"
		if len(e.Servers) == 1 {
			word = "server"
		}
		return fmt.Sprintf("%s, %d %s", strings.Join(l, ", "), len(e.Servers), word)
	case Server:
		s := e.Address.String()
		if e.Weight != 1 {
			s += fmt.Sprintf(", weight %d", e.Weight)
		}
		if e.Backup {
			s += ", backup"
		}
		return s
	case Plugin:
		return strings.Join(e.Command, " ")
	}
	return ""
}

// set compares two lists of addresses, whose order means nothing.
func (w *planner) set(f *field, a, b reflect.Value, at place) {
	has := func(l reflect.Value, v any) bool {
		for i := range l.Len() {
			if l.Index(i).Interface() == v {
				return true
			}
		}
		return false
	}
	for i := range a.Len() {
		if v := a.Index(i).Interface(); !has(b, v) {
			w.add(f.elem, Removed, at.element(fmt.Sprint(v), i, i), "", "")
		}
	}
	for i := range b.Len() {
		if v := b.Index(i).Interface(); !has(a, v) {
			w.add(f.elem, Added, at.element(fmt.Sprint(v), i, i), "", "")
		}
	}
}

// free compares two mappings whose keys are not ours.
func (w *planner) free(f *field, a, b map[string]any, at place) {
	keys := sortedKeys(a)
	for _, k := range sortedKeys(b) {
		if _, ok := a[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		x, inA := a[k]
		y, inB := b[k]
		here := at.key(k)
		xm, ok1 := x.(map[string]any)
		ym, ok2 := y.(map[string]any)
		switch {
		case ok1 && ok2:
			w.free(f, xm, ym, here)
		case !inA:
			w.add(f, Added, here, "", freeText(k, y))
		case !inB:
			w.add(f, Removed, here, freeText(k, x), "")
		case !reflect.DeepEqual(x, y):
			w.add(f, Changed, here, freeText(k, x), freeText(k, y))
		}
	}
}

// longestText bounds how much of a value a plan shows, bytes.
const longestText = 120

// cutMark ends a text that does not show all of a value.
const cutMark = " ..."

func freeText(key string, v any) string {
	n, o := new(yaml.Node), opening{room: longestText}
	if err := n.Encode(o.of(redactedValue(key, v))); err != nil {
		return "?"
	}
	s := flow(n)
	if o.cut && !strings.HasSuffix(s, cutMark) {
		s += cutMark
	}
	return s
}

// opening takes from a value what there is room to show: thousands of routes
// need not be written down for a line of text.
type opening struct {
	room int // bytes, at least what is shown needs
	cut  bool
}

// of leaves out elements of lists behind those that take all the room. It
// changes nothing in v.
func (o *opening) of(v any) any {
	switch x := v.(type) {
	case []any:
		l := make([]any, 0, min(len(x), longestText))
		for _, e := range x {
			if o.room < 0 {
				o.cut = true
				break
			}
			o.room-- // what stands between two
			l = append(l, o.of(e))
		}
		return l
	case map[string]any:
		m := make(map[string]any, len(x))
		for _, k := range sortedKeys(x) {
			o.room -= len(k)
			m[k] = o.of(x[k])
		}
		return m
	case string:
		o.room -= len(x)
	}
	return v
}

// written returns a value as one would write it in one line.
func written(f *field, v reflect.Value) string {
	n, err := dumpValue(f, v, true)
	if err != nil || n == nil {
		return ""
	}
	if n.Kind == yaml.ScalarNode {
		return n.Value
	}
	return flow(n)
}

func flow(n *yaml.Node) string {
	var inline func(*yaml.Node)
	inline = func(n *yaml.Node) {
		if n.Kind != yaml.ScalarNode {
			n.Style = yaml.FlowStyle
		}
		for _, c := range n.Content {
			inline(c)
		}
	}
	inline(n)
	b, err := yaml.Marshal(n)
	if err != nil {
		return "?"
	}
	s := string(bytes.Join(bytes.Fields(b), []byte(" ")))
	if len(s) > longestText {
		s = strings.ToValidUTF8(s[:longestText], "") + cutMark
	}
	return s
}

// WhereNamed is Where for a path with names in place of indexes, as a Change
// has it.
func (c *Config) WhereNamed(path string) (file string, line int) {
	f, v := schema, reflect.ValueOf(c).Elem()
	key := ""
	for path != "" && f != nil {
		if path[0] == '[' {
			name, rest, _ := strings.Cut(path[1:], "]")
			i := elementNamed(f, v, name)
			if i < 0 {
				break
			}
			key = fmt.Sprintf("%s[%d]", key, i)
			f, v, path = f.elem, v.Index(i), rest
			continue
		}
		path = strings.TrimPrefix(path, ".")
		n := strings.IndexAny(path, ".[")
		if n < 0 {
			n = len(path)
		}
		word := path[:n]
		child := f.child(word)
		if f.kind == kindFree || child == nil {
			key = join(key, path) // the keys of a plugin's own configuration
			break
		}
		key = join(key, word)
		f, v, path = child, v.Field(child.index), path[n:]
		if f.kind == kindFree {
			key += path
			break
		}
	}
	return c.Where(key)
}

func elementNamed(f *field, v reflect.Value, name string) int {
	if f.kind != kindList {
		return -1
	}
	for i := range v.Len() {
		e := v.Index(i)
		if f.elem.kind == kindSection {
			e = e.Field(f.elem.fields[0].index)
		}
		if fmt.Sprint(e.Interface()) == name {
			return i
		}
	}
	return -1
}
