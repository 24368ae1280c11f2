// SPDX-License-Identifier: Apache-2.0

package policypb

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// describe lists all that the contract promises, one promise a line.
func describe() []string {
	var out []string
	f := File_policy_proto
	for i := range f.Services().Len() {
		s := f.Services().Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			out = append(out, fmt.Sprintf("method %s(%s) %s client_stream=%t server_stream=%t", m.FullName(), m.Input().FullName(), m.Output().FullName(), m.IsStreamingClient(), m.IsStreamingServer()))
		}
	}
	for i := range f.Enums().Len() {
		e := f.Enums().Get(i)
		for j := range e.Values().Len() {
			v := e.Values().Get(j)
			out = append(out, fmt.Sprintf("value %s.%s = %d", e.FullName(), v.Name(), v.Number()))
		}
	}
	var messages func(protoreflect.MessageDescriptors)
	messages = func(ms protoreflect.MessageDescriptors) {
		for i := range ms.Len() {
			m := ms.Get(i)
			out = append(out, "message "+string(m.FullName()))
			for j := range m.Fields().Len() {
				fd := m.Fields().Get(j)
				kind := fd.Kind().String()
				if fd.Message() != nil {
					kind = string(fd.Message().FullName())
				} else if fd.Enum() != nil {
					kind = string(fd.Enum().FullName())
				}
				line := fmt.Sprintf("field %s = %d %s %s", fd.FullName(), fd.Number(), fd.Cardinality(), kind)
				if o := fd.ContainingOneof(); o != nil {
					line += " oneof " + string(o.Name())
				}
				out = append(out, line)
			}
			messages(m.Messages())
		}
	}
	messages(f.Messages())
	slices.Sort(out)
	return out
}

// TestGoldenDescriptor holds the contract to what it promised: no line of the
// golden file may vanish. A line that is new has to be added to it, which
// WEIR_UPDATE=1 does, and only that.
func TestGoldenDescriptor(t *testing.T) {
	const file = "testdata/policy_v1.golden"
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	golden := strings.Split(strings.TrimSpace(string(b)), "\n")
	now := describe()
	for _, line := range golden {
		if line != "" && !slices.Contains(now, line) {
			t.Errorf("version 1 promised, and no longer has: %s", line)
		}
	}
	if t.Failed() {
		return
	}
	if os.Getenv("WEIR_UPDATE") == "1" {
		if err := os.WriteFile(file, []byte(strings.Join(now, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, line := range now {
		if !slices.Contains(golden, line) {
			t.Errorf("not in %s; run the test with WEIR_UPDATE=1 if it is to be promised: %s", file, line)
		}
	}
}

// TestDocumented looks whether every message, field and method has a comment.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile("policy.proto")
	if err != nil {
		t.Fatal(err)
	}
	before := ""
	for n, line := range strings.Split(string(b), "\n") {
		l := strings.TrimSpace(line)
		declares := strings.HasPrefix(l, "rpc ") || strings.HasPrefix(l, "service ") || strings.HasPrefix(l, "enum ") || strings.HasPrefix(l, "message ") || strings.HasPrefix(l, "oneof ") ||
			(strings.HasPrefix(line, " ") && strings.HasSuffix(l, ";"))
		if declares && !strings.HasPrefix(before, "//") && !strings.Contains(l, "UNSPECIFIED") {
			t.Errorf("policy.proto:%d: %q has no comment", n+1, l)
		}
		before = l
	}
}
