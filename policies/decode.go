// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Decode reads a configuration, a JSON object, into the struct that out points
// to. Keys are the names in json tags, or else the field names in lower case.
// An unknown key, a value of the wrong type and a number out of range are
// *ConfigError with the key's path from "config" on; all of them come back,
// joined. A key that is absent or null leaves its field as it is, so that out
// may hold defaults. Beside the plain types it reads durations ("1.5s"), what
// implements encoding.TextUnmarshaler, and json.RawMessage.
func Decode(config []byte, out any) error {
	v := reflect.ValueOf(out)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("policies.Decode: out is %T, not a pointer to a struct", out)
	}
	if len(bytes.TrimSpace(config)) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(config))
	d.UseNumber()
	var in any
	if err := d.Decode(&in); err != nil {
		return Errorf("config", "is not JSON: %v", err)
	}
	if in == nil {
		return nil
	}
	return errors.Join(decode("config", in, v.Elem())...)
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	rawType      = reflect.TypeFor[json.RawMessage]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// decode puts in, as encoding/json made it, into out. It returns every error.
func decode(key string, in any, out reflect.Value) []error {
	fail := func(want string) []error {
		return []error{Errorf(key, "is %s, expected %s", kindOf(in), want)}
	}
	if in == nil {
		return nil
	}
	switch t := out.Type(); {
	case t == rawType:
		b, err := json.Marshal(in)
		if err != nil {
			return []error{Errorf(key, "%v", err)}
		}
		out.SetBytes(b)
		return nil
	case t == durationType:
		s, ok := in.(string)
		if !ok {
			return fail(`a duration such as "1.5s"`)
		}
		n, err := time.ParseDuration(s)
		if err != nil {
			return []error{Errorf(key, "%q is not a duration such as 1.5s", s)}
		}
		out.SetInt(int64(n))
		return nil
	case t.Kind() != reflect.Pointer && reflect.PointerTo(t).Implements(textType):
		s, ok := in.(string)
		if !ok {
			return fail("a string")
		}
		if err := out.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(s)); err != nil {
			return []error{Errorf(key, "%v", err)}
		}
		return nil
	}
	switch out.Kind() {
	case reflect.Pointer:
		if out.IsNil() {
			out.Set(reflect.New(out.Type().Elem()))
		}
		return decode(key, in, out.Elem())
	case reflect.Struct:
		m, ok := in.(map[string]any)
		if !ok {
			return fail("a map")
		}
		return decodeStruct(key, m, out)
	case reflect.Map:
		m, ok := in.(map[string]any)
		if !ok || out.Type().Key().Kind() != reflect.String {
			return fail("a map")
		}
		var errs []error
		all := reflect.MakeMapWithSize(out.Type(), len(m))
		for _, k := range sortedKeys(m) {
			v := reflect.New(out.Type().Elem()).Elem()
			errs = append(errs, decode(key+"."+k, m[k], v)...)
			all.SetMapIndex(reflect.ValueOf(k).Convert(out.Type().Key()), v)
		}
		out.Set(all)
		return errs
	case reflect.Slice:
		l, ok := in.([]any)
		if !ok {
			return fail("a list")
		}
		var errs []error
		all := reflect.MakeSlice(out.Type(), len(l), len(l))
		for i := range l {
			errs = append(errs, decode(fmt.Sprintf("%s[%d]", key, i), l[i], all.Index(i))...)
		}
		out.Set(all)
		return errs
	case reflect.String:
		s, ok := in.(string)
		if !ok {
			return fail("a string")
		}
		out.SetString(s)
		return nil
	case reflect.Bool:
		b, ok := in.(bool)
		if !ok {
			return fail("true or false")
		}
		out.SetBool(b)
		return nil
	case reflect.Interface:
		out.Set(reflect.ValueOf(in))
		return nil
	}
	if !out.CanInt() && !out.CanUint() && !out.CanFloat() {
		return []error{Errorf(key, "has a Go type that a configuration cannot fill: %s", out.Type())}
	}
	n, ok := in.(json.Number)
	if !ok {
		return fail("a number")
	}
	if err := decodeNumber(string(n), out); err != "" {
		return []error{Errorf(key, "is %s, expected %s", n, err)}
	}
	return nil
}

func decodeStruct(key string, m map[string]any, out reflect.Value) []error {
	var errs []error
	var known []string
	for i := range out.NumField() {
		f := out.Type().Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "-" {
			continue
		}
		if name == "" {
			name = strings.ToLower(f.Name)
		}
		known = append(known, name)
		if v, ok := m[name]; ok {
			errs = append(errs, decode(key+"."+name, v, out.Field(i))...)
		}
	}
	for _, k := range sortedKeys(m) {
		if !slices.Contains(known, k) {
			errs = append(errs, Errorf(key+"."+k, "unknown key, expected one of %s", strings.Join(known, ", ")))
		}
	}
	return errs
}

// decodeNumber returns what was expected where the number does not fit.
func decodeNumber(s string, out reflect.Value) string {
	bits := out.Type().Bits()
	switch {
	case out.CanInt():
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || out.OverflowInt(n) {
			return fmt.Sprintf("a whole number of %d bits", bits)
		}
		out.SetInt(n)
	case out.CanUint():
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil || out.OverflowUint(n) {
			return fmt.Sprintf("a whole number from 0 to %d", uint64(math.MaxUint64)>>(64-bits))
		}
		out.SetUint(n)
	default:
		n, err := strconv.ParseFloat(s, 64)
		if err != nil || out.OverflowFloat(n) {
			return "a number"
		}
		out.SetFloat(n)
	}
	return ""
}

func kindOf(in any) string {
	switch in.(type) {
	case string:
		return "a string"
	case json.Number:
		return "a number"
	case bool:
		return "true or false"
	case []any:
		return "a list"
	case map[string]any:
		return "a map"
	}
	return "nothing"
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
