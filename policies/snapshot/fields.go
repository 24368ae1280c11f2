// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// MaxFields is how many header fields the policies of a farm may look at
// together. All cookies are one field.
const MaxFields = 16

// maxFieldName is the longest name of a header field or cookie, in bytes.
const maxFieldName = 40

// Field names a part of a request's head beside the request line and the host:
// a header field or a cookie.
type Field struct {
	Name   string // of the header field, in any case, or of the cookie
	Cookie bool
}

// String returns the field as explanations show it.
func (f Field) String() string {
	if f.Cookie {
		return "cookie " + f.Name
	}
	return strings.ToLower(f.Name)
}

// CheckField says what is wrong with a field's name, nil if nothing.
func CheckField(f Field) error {
	what := "header field"
	if f.Cookie {
		what = "cookie"
	}
	if f.Name == "" || len(f.Name) > maxFieldName {
		return fmt.Errorf("%s %q: expected a name of 1 to %d bytes", what, f.Name, maxFieldName)
	}
	for i := range len(f.Name) {
		c := f.Name[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte("()<>@,;:\\\"/[]?={}", c) >= 0 {
			return fmt.Errorf("%s %q: a name has no %q", what, f.Name, c)
		}
	}
	return nil
}

// fieldRef is a Field as a Selector has it: the place of the header field's
// value in Request.Fields, and the cookie's name in it.
type fieldRef struct {
	at     int
	cookie string // "": the whole value
}

// value returns the field's value in a request, nil if it has none.
func (f *fieldRef) value(r *Request) []byte {
	if f.at >= len(r.Fields) {
		return nil
	}
	v := r.Fields[f.at]
	if f.cookie != "" {
		return cookieValue(v, f.cookie)
	}
	return v
}

// cookieValue returns the value of a cookie out of a Cookie field (RFC 6265
// section 4.2.1), nil if it is not there. Quotes are part of a value.
func cookieValue(field []byte, name string) []byte {
	for len(field) > 0 {
		pair := field
		if i := bytes.IndexByte(field, ';'); i >= 0 {
			pair, field = field[:i], field[i+1:]
		} else {
			field = nil
		}
		for len(pair) > 0 && (pair[0] == ' ' || pair[0] == '\t') {
			pair = pair[1:]
		}
		if len(pair) > len(name) && pair[len(name)] == '=' && string(pair[:len(name)]) == name {
			v := pair[len(name)+1:]
			for len(v) > 0 && (v[len(v)-1] == ' ' || v[len(v)-1] == '\t') {
				v = v[:len(v)-1]
			}
			return v[:len(v):len(v)]
		}
	}
	return nil
}

// want gives a field its place in Request.Fields.
func (s *Selector) want(f Field) (fieldRef, error) {
	if err := CheckField(f); err != nil {
		return fieldRef{}, err
	}
	name, ref := strings.ToLower(f.Name), fieldRef{}
	if f.Cookie {
		name, ref.cookie = "cookie", f.Name
	}
	if ref.at = slices.Index(s.fields, name); ref.at < 0 {
		if len(s.fields) == MaxFields {
			return ref, fmt.Errorf("%s: the farm's policies look at more than %d header fields", f, MaxFields)
		}
		ref.at = len(s.fields)
		s.fields = append(s.fields, name)
	}
	return ref, nil
}

// Fields returns the names of the header fields that the policies look at, in
// lower case and in the order of Request.Fields. The caller must not change it.
func (s *Selector) Fields() []string { return s.fields }
