// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"reflect"
	"strconv"
)

// JSONSchema returns docs/weir.schema.json, made from the schema: a JSON Schema
// (draft 2020-12) of one configuration file, for editors. It knows keys, types,
// ranges and words. What concerns more than one value, and whether an address
// is one, only Load knows; and because a file of conf.d may hold any part,
// nothing is required at top level.
func JSONSchema() []byte {
	root := schema.jsonSchema()
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	root["title"] = "Weir"
	root["description"] = "Configuration of Weir, the multiplexer for Linux routers."
	b, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		panic("config: JSON Schema: " + err.Error()) // It is made of strings and maps.
	}
	return append(b, '\n')
}

type object = map[string]any

// jsonSchema describes one key.
func (f *field) jsonSchema() object {
	var o object
	switch f.kind {
	case kindFree:
		o = object{"type": "object"}
	case kindList:
		o = object{"type": "array", "items": f.elem.jsonSchema()}
		if f.single {
			o = object{"anyOf": []any{f.elem.jsonSchema(), o}}
		}
	case kindSection:
		props, required := object{}, []string{}
		for _, c := range f.fields {
			props[c.name] = c.jsonSchema()
			if c.need != "" && !c.hasDef && c.need != "checksum" {
				required = append(required, c.name)
			}
		}
		o = object{"type": "object", "properties": props, "additionalProperties": false}
		if len(required) > 0 {
			o["required"] = required
		}
		if f.short != "" {
			o = object{"anyOf": []any{f.child(f.short).scalarSchema(), o}}
		}
	default:
		o = f.scalarSchema()
	}
	if f.doc != "" {
		o["description"] = f.doc
	}
	if f.hasDef {
		o["default"] = f.jsonDefault()
	}
	return o
}

// scalarSchema describes a single word. YAML gives a number the type of a
// number, so that one is allowed wherever the text of one is.
func (f *field) scalarSchema() object {
	switch {
	case f.numeric:
		o := object{"type": "integer", "minimum": f.min}
		if f.max != 0 {
			o["maximum"] = f.max
		}
		return o
	case f.typ.Kind() == reflect.Bool:
		return object{"type": "boolean"}
	case f.enum != nil:
		return object{"enum": f.enum}
	}
	switch f.typ {
	case reflect.TypeFor[Duration]():
		return object{"type": []string{"string", "integer"}, "pattern": `^(0|([0-9]+(\.[0-9]*)?(ns|us|µs|μs|ms|s|m|h))+)$`, "maximum": 0}
	case reflect.TypeFor[ByteSize]():
		return object{"type": []string{"string", "integer"}, "pattern": `^[0-9]+([KMG]iB)?$`, "minimum": 0}
	case reflect.TypeFor[Rate]():
		return object{"type": []string{"string", "number"}, "pattern": `^[0-9.]+([KkMmGgTt]?[Ii]?([Bb][Ii][Tt]|[Bb][Pp][Ss]))?$`, "minimum": 0}
	case reflect.TypeFor[PortRange]():
		return object{"type": "string", "pattern": `^[0-9]+ *- *[0-9]+$`}
	case reflect.TypeFor[Shards]():
		return object{"anyOf": []any{object{"const": "auto"}, object{"type": "integer", "minimum": 1, "maximum": maxShards}}}
	case reflect.TypeFor[Mark]():
		return object{"type": "string", "pattern": `^[^/]+/[^/]+$`}
	}
	o := object{"type": "string"}
	switch f.need {
	case "name":
		o["pattern"] = namePattern.String()
	case "table":
		o["pattern"] = tablePattern.String()
	case "checksum":
		o["pattern"] = `^$|` + checksumPattern.String()
	case "socket":
		o["pattern"] = "^/"
		o["maxLength"] = maxSocket
	case "value":
		o["minLength"] = 1
	}
	return o
}

func (f *field) jsonDefault() any {
	if f.numeric {
		if n, err := strconv.Atoi(f.def); err == nil {
			return n
		}
	}
	if f.typ.Kind() == reflect.Bool {
		return f.def == "true"
	}
	return f.def
}
