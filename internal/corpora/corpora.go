// SPDX-License-Identifier: Apache-2.0

// Package corpora reads collections of HTTP/1 messages with known outcomes for
// the tests of the scanners and of the engine. They belong to others and are not
// part of this repository: they lie in the directory that the environment
// variable WEIR_CORPORA names, or in shared/corpora beside the checkout.
//
// It is for tests only, and must not judge: what a case means for Weir is said
// where it is played.
package corpora

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/weirgate/weir/internal/require"
)

// open opens a file of the corpora, or skips the test.
func open(t testing.TB, name string) *os.File {
	t.Helper()
	dir := os.Getenv("WEIR_CORPORA")
	if dir == "" {
		dir = beside(t)
	}
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		require.Missing(t, "corpora", err.Error())
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// beside returns the directory beside the checkout in which the test runs.
func beside(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for at := dir; filepath.Dir(at) != at; at = filepath.Dir(at) {
		if _, err := os.Stat(filepath.Join(at, "go.mod")); err == nil {
			return filepath.Join(at, "..", "shared", "corpora")
		}
	}
	t.Fatalf("%s is in no checkout", dir)
	return ""
}

// A Case is one case of llhttp.jsonl: a stream of messages.
type Case struct {
	ID   string
	Type string // request, response; others are those of lenient parsers
	Raw  []byte
	// Error is what llhttp says against it, or nil.
	Error *string
	// MessageEnd are the offsets at which its messages end.
	MessageEnd []int `json:"message_end"`
}

// Request says that the case is a stream of requests, not of responses.
func (c *Case) Request() bool { return strings.HasPrefix(c.Type, "request") }

// Valid says that llhttp frames the whole stream.
func (c *Case) Valid() bool {
	if c.Error == nil {
		return true
	}
	// These end the parser's duty, not the message's validity.
	return strings.HasPrefix(*c.Error, "Pause on CONNECT/Upgrade") || strings.HasPrefix(*c.Error, "Data after `Connection: close`")
}

// LLHTTP reads the strict cases of both types, and those of all types when all
// is set. The corpus lacks the white space at the end of its cases, so the CRLF
// that some message ends count is put back.
func LLHTTP(t testing.TB, all bool) (cases []Case) {
	t.Helper()
	sc := bufio.NewScanner(open(t, "llhttp.jsonl"))
	sc.Buffer(nil, 1<<24)
	for sc.Scan() {
		var c Case
		if err := json.Unmarshal(sc.Bytes(), &c); err != nil {
			t.Fatal(err)
		}
		if !all && c.Type != "request" && c.Type != "response" {
			continue
		}
		c.ID = strings.TrimPrefix(c.ID, "llhttp/")
		// Its ends count octets from 0x80 as two.
		for i := range c.MessageEnd {
			for k, o := range c.Raw {
				if o >= 0x80 && k < c.MessageEnd[i] {
					c.MessageEnd[i]--
				}
			}
		}
		if n := len(c.MessageEnd); n > 0 && c.MessageEnd[n-1] > len(c.Raw) {
			c.Raw = append(c.Raw, "\r\n\r\n"[:c.MessageEnd[n-1]-len(c.Raw)]...)
		}
		cases = append(cases, c)
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	return cases
}

// Stream returns the case as a stream that a strict reader can judge, and the
// ends of its messages there. Every HTTP/1.1 request has a Host field, for which
// llhttp does not ask; what is not valid is followed by the white space that the
// corpus lacks, so that its last line is complete.
func (c *Case) Stream() (msg []byte, ends []int) {
	msg, ends = bytes.Clone(c.Raw), c.MessageEnd
	if c.Request() {
		msg, ends = c.hosted()
	}
	if !c.Valid() {
		msg = append(msg, "\r\n\r\n"...)
	}
	return msg, ends
}

func (c *Case) hosted() (msg []byte, ends []int) {
	at := 0
	for _, end := range append(c.MessageEnd, len(c.Raw)) {
		m := c.Raw[at:max(at, min(end, len(c.Raw)))]
		line := bytes.Index(m, []byte(" HTTP/1.1\r\n"))
		if line >= 0 && !bytes.Contains(bytes.ToLower(m), []byte("\nhost:")) {
			line += len(" HTTP/1.1\r\n")
			h := "Host: x\r\n"
			if k := bytes.Index(m[:line], []byte("http://")); k >= 0 {
				a := m[k+7 : line]
				h = "Host: " + string(a[:bytes.IndexAny(a, "/? ")]) + "\r\n"
			}
			m = bytes.Join([][]byte{m[:line], m[line:]}, []byte(h))
		}
		msg = append(msg, m...)
		if len(ends) < len(c.MessageEnd) {
			ends = append(ends, len(msg))
		}
		at = end
	}
	return msg, ends
}

// A Guardian is one case of desync-guardian.json: one request. The characters
// of names and values are octets; those beyond are UTF-8.
type Guardian struct {
	Name, URI, Method, Version string
	Headers                    []struct {
		Name  string
		Value any // string or number
	}
	Expected struct {
		Tier   string // Compliant, Acceptable, Ambiguous, Severe
		Reason string
	}
}

// DesyncGuardian reads all cases.
func DesyncGuardian(t testing.TB) (cases []Guardian) {
	t.Helper()
	if err := json.NewDecoder(open(t, "desync-guardian.json")).Decode(&cases); err != nil {
		t.Fatal(err)
	}
	return cases
}

// Messages writes the case as requests: with octets, and with UTF-8 throughout.
func (c *Guardian) Messages() [2][]byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", c.Method, c.URI)
	if c.Version != "" {
		b.WriteString(" " + c.Version)
	}
	b.WriteString("\r\n")
	hosted := false
	for _, h := range c.Headers {
		fmt.Fprintf(&b, "%s:%v\r\n", h.Name, h.Value)
		hosted = hosted || strings.EqualFold(h.Name, "host")
	}
	if !hosted {
		b.WriteString("Host: x\r\n")
	}
	b.WriteString("\r\n")
	var octets []byte
	for _, r := range b.String() {
		if r < 0x100 {
			octets = append(octets, byte(r))
		} else {
			octets = utf8.AppendRune(octets, r)
		}
	}
	return [2][]byte{octets, []byte(b.String())}
}
