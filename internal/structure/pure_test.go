// SPDX-License-Identifier: Apache-2.0

package structure

import (
	"fmt"
	"go/ast"
	"slices"
	"strings"
	"testing"
)

// pureDirs do no I/O, read no clock, spawn no goroutine: what they do depends on
// their arguments alone, and so a failing seed can be replayed.
var pureDirs = []string{
	"module/engine", "module/farm", "module/http1", "module/packet", "module/pool", "module/splice", "policies/snapshot",
}

// pureImports are the packages outside the tree that a pure one may import. A
// list of what is allowed, not of what is forbidden: something new has to be
// looked at once.
var pureImports = []string{
	"bytes", "cmp", "container/heap", "container/list", "encoding/base64", "encoding/binary", "encoding/hex", "errors",
	"fmt", "hash/crc32", "hash/fnv", "hash/maphash", "iter", "maps", "math", "math/bits", "math/rand/v2", "net/netip", "slices",
	"sort", "strconv", "strings", "sync/atomic", "time", "unicode", "unicode/utf8", "unsafe",
	"github.com/dchest/siphash",
}

// impureNames are what the allowed packages offer that is not pure: clocks and
// timers, writing to standard output, random numbers without a seed.
var impureNames = map[string][]string{
	"time":         {"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker", "LoadLocation", "Local"},
	"fmt":          {"Print", "Printf", "Println", "Fprint", "Fprintf", "Fprintln", "Scan", "Scanf", "Scanln"},
	"hash/maphash": {"MakeSeed"},
	"math/rand/v2": {
		"Int", "IntN", "Int32", "Int32N", "Int64", "Int64N", "Uint", "UintN", "Uint32", "Uint32N", "Uint64", "Uint64N",
		"Float32", "Float64", "ExpFloat64", "NormFloat64", "N", "Perm", "Shuffle",
	},
}

// pureFindings says what in a file is not pure.
func pureFindings(f *file) (out []string) {
	for p := range f.imports {
		if dir := ours(p); dir != "" {
			// The flow table is plain memory behind an interface: the engine
			// works on its records. Nothing else of ours that is impure.
			if !within(dir, pureDirs...) && (dir != "module/flowstore" || !within(f.dir, "module/engine", "module/splice", "module/pool")) {
				out = append(out, finding(f, "imports %s, which is not pure", dir))
			}
			continue
		}
		if !slices.Contains(pureImports, p) {
			out = append(out, finding(f, "imports %s, which does I/O or nobody has looked at: see pureImports", p))
		}
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			out = append(out, finding(f, "spawns a goroutine"))
		case *ast.SelectStmt:
			out = append(out, finding(f, "waits for a channel"))
		case *ast.CallExpr:
			if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "print" || id.Name == "println") {
				out = append(out, finding(f, "calls %s", id.Name))
			}
		case *ast.SelectorExpr:
			id, ok := n.X.(*ast.Ident)
			if !ok {
				return true
			}
			for p, names := range impureNames {
				if f.imports[p] == id.Name && slices.Contains(names, n.Sel.Name) {
					out = append(out, finding(f, "uses %s.%s", p, n.Sel.Name))
				}
			}
		}
		return true
	})
	for _, i := range f.ast.Imports {
		if i.Name != nil && i.Name.Name == "." {
			out = append(out, finding(f, "imports %s without a name, which hides what is used", i.Path.Value))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func TestPurePackages(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range tree(t) {
		if f.test || !within(f.dir, pureDirs...) {
			continue
		}
		seen[f.dir] = true
		report(t, pureFindings(f))
	}
	for _, d := range pureDirs {
		if !seen[d] {
			t.Errorf("%s has no Go file; was it renamed?", d)
		}
	}
}

// TestPureControl is the negative control: each of these must be found.
func TestPureControl(t *testing.T) {
	for _, c := range []struct{ src, want string }{
		{`import "os"; var _ = os.Args`, "imports os"},
		{`import "net"; var _ net.Conn`, "imports net,"},
		{`import "golang.org/x/sys/unix"; var _ = unix.Getpid`, "imports golang.org/x/sys/unix"},
		{`import "syscall"; var _ = syscall.Getpid`, "imports syscall"},
		{`import "crypto/rand"; var _ = rand.Read`, "imports crypto/rand"},
		{`import "math/rand"; var _ = rand.Int`, "imports math/rand,"},
		{`import "sync"; var _ sync.Mutex`, "imports sync,"},
		{`import "log/slog"; var _ = slog.Info`, "imports log/slog"},
		{`import "time"; var _ = time.Now()`, "uses time.Now"},
		{`import clock "time"; func f() { clock.Sleep(1) }`, "uses time.Sleep"},
		{`import . "time"; var _ = Now()`, "without a name"},
		{`import "fmt"; func f() { fmt.Println() }`, "uses fmt.Println"},
		{`import "math/rand/v2"; var _ = rand.Uint64()`, "uses math/rand/v2.Uint64"},
		{`func f() { go f() }`, "spawns a goroutine"},
		{`func f(c chan int) { select { case <-c: } }`, "waits for a channel"},
		{`func f() { println(1) }`, "calls println"},
		{`import "` + modulePath + `/module/divert"; var _ = divert.X`, "imports module/divert"},
		{`import "` + modulePath + `/module"; var _ = module.X`, "imports module, which"},
	} {
		f, err := parseSource("module/engine/x.go", []byte("package engine\n"+c.src+"\n"))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(pureFindings(f), "\n"); !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.src, got, c.want)
		}
	}
	const good = `import ("time"; "math/rand/v2"; "net/netip"; "` + modulePath + `/module/packet")
var _ = time.Second
var _ = rand.New(rand.NewPCG(1, 2)).Uint64()
var _ netip.Addr
var _ packet.Seq`
	f, err := parseSource("module/engine/x.go", []byte(fmt.Sprintf("package engine\n%s\n", good)))
	if err != nil {
		t.Fatal(err)
	}
	if got := pureFindings(f); len(got) != 0 {
		t.Errorf("a pure file is accused: %v", got)
	}
}
