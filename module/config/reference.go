// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
)

// Reference returns docs/config.md: every key with its default, its form and
// what it does, made from the schema.
func Reference() []byte {
	var b bytes.Buffer
	b.WriteString(referenceHead)
	fmt.Fprintf(&b, "\n## Top level\n\n")
	referenceTable(&b, schema, true)
	for _, f := range schema.fields {
		referenceSection(&b, f)
	}
	return b.Bytes()
}

const referenceHead = `# Configuration reference

This file is generated from the types of ` + "`module/config`" + `; change it there.

Weir reads YAML in layers, each over the one before:

1. the defaults below,
2. ` + "`/etc/weir/weir.yaml`" + `,
3. ` + "`/etc/weir/conf.d/*.yaml`" + ` in the order of their names (hidden files and other endings are not read),
4. environment variables,
5. the command line: ` + "`--set KEY=VALUE`" + ` with a key path such as ` + "`admin.socket`" + `, repeatable.

` + "`--config`" + ` replaces both layers in ` + "`/etc`" + `; it takes a file or a directory and can be repeated.

A higher layer replaces single values and lists, but ` + "`farms` and `plugins`" + ` of several files are put together; a name that two files give is an error.

An environment variable sets a single value outside lists. Its name is ` + "`WEIR_`" + ` and the key path in capitals, with two underscores between levels: ` + "`WEIR_ADMIN__SOCKET`, `WEIR_STOP_TIMEOUT`" + `. A name with two underscores that fits no key is an error, and so is one that would fit with two (` + "`WEIR_LOG_LEVEL`" + `). Other variables that begin with ` + "`WEIR_`" + ` are ignored.

Unknown keys, wrong types and contradictions are errors. All of them are reported at once, each with file, line and key path:

` + "```" + `
weir.yaml:7: farms[0].lisen: unknown key; expected one of name, listen, …; did you mean "listen"?
` + "```" + `

Durations are Go's (` + "`300ms`, `10s`, `1h30m`" + `), sizes plain bytes or ` + "`KiB`, `MiB`, `GiB`" + `, rates as in tc (` + "`100Mbit`" + `). Addresses are literal: names are not looked up. 0 is no limit where it is allowed. "Restart" marks what a running instance cannot change.
`

func referenceSection(b *bytes.Buffer, f *field) {
	if len(f.fields) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## %s\n\n%s\n\n", f.path, f.doc)
	referenceTable(b, f, false)
	for _, c := range f.fields {
		referenceSection(b, c)
	}
}

func referenceTable(b *bytes.Buffer, f *field, links bool) {
	b.WriteString("| key | value | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, c := range f.fields {
		meaning := c.doc
		if links && len(c.fields) > 0 {
			meaning += " See below."
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", c.name, cell(c.form()), c.defaultCell(), cell(meaning))
	}
}

// cell keeps a text inside its table cell.
func cell(s string) string { return strings.ReplaceAll(s, "|", "\\|") }

// form says how a value is written, shorter than expected.
func (f *field) form() string {
	switch f.kind {
	case kindSection:
		return "mapping"
	case kindFree:
		return "mapping, the plugin's own"
	case kindList:
		switch {
		case f.single:
			return f.elem.form() + ", or a list"
		case f.elem.short != "":
			return "list of names or mappings"
		}
		if f.elem.typ == typeAddr {
			return "list of addresses"
		}
		if f.elem.typ == reflect.TypeFor[Prefix]() {
			return "list of prefixes"
		}
		if f.elem.isText() {
			return "list of words"
		}
		return "list of " + f.elem.form() + "s"
	}
	switch f.typ {
	case typeAddr:
		return "address"
	case typeAddrPort:
		return "address:port"
	}
	e := f.expected()
	if i := strings.Index(e, ", such as"); i > 0 {
		e = e[:i]
	}
	if i := strings.Index(e, " such as"); i > 0 {
		e = e[:i]
	}
	if i := strings.Index(e, ":"); i > 0 {
		e = e[:i]
	}
	return strings.TrimPrefix(strings.TrimPrefix(e, "a "), "one of ")
}

func (f *field) defaultCell() string {
	switch {
	case f.kind == kindSection:
		return ""
	case f.hasDef:
		return "`" + f.def + "`"
	case f.need != "" && f.need != "checksum":
		return "required"
	case f.kind == kindList || f.kind == kindFree:
		return "none"
	}
	return "empty"
}
