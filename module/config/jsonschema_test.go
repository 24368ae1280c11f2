// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// TestJSONSchemaCurrent: the file in docs is what the types say.
func TestJSONSchemaCurrent(t *testing.T) {
	const path = "../../docs/weir.schema.json"
	if *update {
		if err := os.WriteFile(path, JSONSchema(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(have), string(JSONSchema())); d != "" {
		t.Errorf("docs/weir.schema.json is not current; make it anew by go test ./module/config -update (-have +want):\n%s", d)
	}
}

// fits checks a document against a schema: as much of JSON Schema as ours
// uses, and nothing that it does not.
func fits(s map[string]any, v any, at string) (problems []string) {
	bad := func(format string, a ...any) {
		problems = append(problems, at+": "+fmt.Sprintf(format, a...))
	}
	for k, want := range s {
		switch k {
		case "$schema", "title", "description", "default", "properties", "additionalProperties":
		case "type":
			var types []any
			if list, ok := want.([]any); ok {
				types = list
			} else {
				types = []any{want}
			}
			is := map[string]bool{}
			switch v.(type) {
			case string:
				is["string"] = true
			case int:
				is["integer"], is["number"] = true, true
			case float64:
				is["number"] = true
			case bool:
				is["boolean"] = true
			case []any:
				is["array"] = true
			case map[string]any:
				is["object"] = true
			}
			if !slices.ContainsFunc(types, func(t any) bool { return is[t.(string)] }) {
				bad("%v is no %v", v, want)
			}
		case "anyOf":
			if !slices.ContainsFunc(want.([]any), func(o any) bool { return len(fits(o.(map[string]any), v, at)) == 0 }) {
				bad("%v is none of %v", v, want)
			}
		case "enum":
			if !slices.Contains(want.([]any), v) {
				bad("%v is not one of %v", v, want)
			}
		case "const":
			if v != want {
				bad("%v is not %v", v, want)
			}
		case "pattern":
			if text, ok := v.(string); ok && !regexp.MustCompile(want.(string)).MatchString(text) {
				bad("%q does not match %s", text, want)
			}
		case "minLength":
			if text, ok := v.(string); ok && len(text) < int(want.(float64)) {
				bad("too short")
			}
		case "maxLength":
			if text, ok := v.(string); ok && len(text) > int(want.(float64)) {
				bad("too long")
			}
		case "minimum":
			if n, ok := v.(int); ok && n < int(want.(float64)) {
				bad("%d is below %v", n, want)
			}
		case "maximum":
			if n, ok := v.(int); ok && n > int(want.(float64)) {
				bad("%d is above %v", n, want)
			}
		case "required":
			if m, ok := v.(map[string]any); ok {
				for _, r := range want.([]any) {
					if _, ok := m[r.(string)]; !ok {
						bad("no %s", r)
					}
				}
			}
		case "items":
			list, _ := v.([]any)
			for i, e := range list {
				problems = append(problems, fits(want.(map[string]any), e, fmt.Sprintf("%s[%d]", at, i))...)
			}
		default:
			bad("the schema has %s, which this test does not know", k)
		}
	}
	m, ok := v.(map[string]any)
	if props, has := s["properties"].(map[string]any); has && ok {
		for k, e := range m {
			switch p := props[k].(type) {
			case nil:
				if s["additionalProperties"] == false {
					bad("unknown key %s", k)
				}
			case map[string]any:
				if e != nil { // An empty key is left out.
					problems = append(problems, fits(p, e, at+"."+k)...)
				}
			}
		}
	}
	return problems
}

func fitsFile(t *testing.T, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var doc any
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return []string{err.Error()}
	}
	var s map[string]any
	if err := json.Unmarshal(JSONSchema(), &s); err != nil {
		t.Fatal(err)
	}
	return fits(s, doc, "")
}

// TestJSONSchemaAgrees: what the schema refuses, Load refuses too. It need not
// be the other way round, but keys, types and ranges are the schema's business.
func TestJSONSchemaAgrees(t *testing.T) {
	good := []string{"../../docs/examples/weir.yaml"}
	for _, g := range good {
		if p := fitsFile(t, g); len(p) > 0 {
			t.Errorf("%s is right, and the schema refuses it:\n%s", g, strings.Join(p, "\n"))
		}
	}
	for _, name := range []string{"unknown-key", "wrong-types"} {
		if p := fitsFile(t, filepath.Join("testdata/broken", name+".yaml")); len(p) == 0 {
			t.Errorf("the schema does not see what is wrong with %s", name)
		}
	}
	// Every default fits its own schema.
	var walk func(f *field)
	walk = func(f *field) {
		for _, c := range f.fields {
			if c.hasDef && c.kind == kindScalar {
				b, err := json.Marshal(c.jsonSchema())
				if err != nil {
					t.Fatal(err)
				}
				var s map[string]any
				if err := json.Unmarshal(b, &s); err != nil {
					t.Fatal(err)
				}
				if p := fits(s, c.jsonDefault(), c.path); len(p) > 0 {
					t.Errorf("%v", p)
				}
			}
			if c.typ != reflect.TypeFor[map[string]any]() {
				walk(c)
			}
		}
	}
	walk(schema)
}
