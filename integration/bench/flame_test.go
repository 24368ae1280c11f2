// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

const someStacks = "weir \n\t  ffff81 nf_reinject+0x10\n\t  ffff80 entry_SYSCALL\n\t  47aa github.com/weirgate/weir/module/divert.(*batched).write (inlined)\n\t 47bb main.run\n\t 47cc runtime.goexit.abi0\n\n" +
	"weir \n\t  47ee github.com/weirgate/weir/module/engine.(*Engine).Step\n\t 47bb main.run\n\n"

// TestFlame: the stacks of perf become a tree, and the tree a picture.
func TestFlame(t *testing.T) {
	root, err := stacks(strings.NewReader(someStacks))
	if err != nil {
		t.Fatal(err)
	}
	if root.n != 2 || root.calls["main.run"] == nil || root.calls["main.run"].n != 2 {
		t.Fatalf("%+v", root)
	}
	if n := root.within("divert.(*batched).write"); n != 1 {
		t.Errorf("%d samples in write, want 1", n)
	}
	var b bytes.Buffer
	if err := root.flame(&b, "a <title>"); err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(bytes.NewReader(b.Bytes())); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
	}
	if !strings.Contains(b.String(), "nf_reinject 50.0 %") {
		t.Errorf("no frame of the kernel in\n%s", b.String())
	}
}
