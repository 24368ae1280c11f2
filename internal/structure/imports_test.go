// SPDX-License-Identifier: Apache-2.0

package structure

import (
	"slices"
	"strings"
	"testing"
)

// rule says what files below one of the directories may import of ours. The
// first rule whose directory matches counts.
type rule struct {
	dirs  []string // with everything below
	exact bool     // only the directories themselves
	may   []string // with everything below; nil: nothing
	tests []string // what their tests may import beside that
}

// Everybody's tests may use these.
var testHelpers = []string{"internal/require", "internal/corpora"}

var rules = []rule{
	// The command line, and what joins it to the parts that act on the host.
	{dirs: []string{"internal/cli"}, may: []string{"module/config", "module/control"}, tests: []string{"module"}},
	{dirs: []string{"internal/hooks"}, may: []string{"internal/cli", "internal/filelock", "internal/supervise", "module", "nft", "plugins/host", "policies", "integration/demo"}},
	{dirs: []string{"internal/corpora"}, may: []string{"internal/require"}},
	{dirs: []string{"internal/require", "internal/structure", "internal/cmd", "internal/build", "internal/filelock", "internal/supervise", "internal/units"}},
	{dirs: []string{"module/packet", "module/http1", "policies/snapshot", "policies/policypb"}},
	// The contract: a plugin's author gets these and nothing of the module.
	{dirs: []string{"policies"}, may: []string{"policies", "internal/units"}, tests: []string{"plugins"}},
	{dirs: []string{"plugins/host"}, may: []string{"policies"}, tests: []string{"plugins", "policies"}},
	{dirs: []string{"plugins"}, may: []string{"policies"}, tests: []string{"plugins/host"}},
	{dirs: []string{"nft"}, may: []string{"nft", "module/packet"}, tests: []string{"integration/lab"}},
	{dirs: []string{"module/config"}, may: []string{"internal/units"}},
	{dirs: []string{"module/farm"}, may: []string{"module/packet", "module/http1", "policies/snapshot"}},
	{dirs: []string{"module/flowstore", "module/splice"}, may: []string{"module/packet", "module/http1", "module/flowstore", "module/splice"}},
	{dirs: []string{"module/pool"}, may: []string{"module/packet", "module/farm", "module/flowstore", "module/splice", "policies/snapshot"}},
	{dirs: []string{"module/engine"}, may: []string{"module/packet", "module/http1", "module/farm", "module/flowstore", "module/splice", "module/pool", "policies/snapshot"}},
	{dirs: []string{"module/divert"}, may: []string{"module/packet"}, tests: []string{"integration/lab", "nft"}},
	{dirs: []string{"module/syncookie"}, may: []string{"module/packet", "module/engine"}, tests: []string{"module/flowstore"}},
	// The rest of the module, control and the root that wires everything.
	{dirs: []string{"module"}, may: []string{"internal/filelock", "module", "nft", "plugins/host", "policies"}, tests: []string{"integration/lab"}},
	{dirs: []string{"cmd"}, may: []string{"internal/cli", "internal/hooks"}},
	{dirs: []string{"integration"}, may: []string{"integration", "module", "nft", "plugins/host", "policies", "internal/require"}},
}

// kernelImports talk to the kernel, or open the door to it.
var kernelImports = []string{
	"syscall", "golang.org/x/sys/unix", "github.com/mdlayher/netlink", "github.com/mdlayher/socket",
	"github.com/google/nftables", "github.com/florianl/go-nfqueue/v2", "github.com/vishvananda/netlink", "github.com/vishvananda/netns",
	"github.com/cilium/ebpf",
}

// kernelDirs of the module and nft may import those (DESIGN: only divert, nft
// and flowstore touch the kernel; and syncookie, which came later).
var kernelDirs = []string{"module/divert", "module/flowstore", "module/syncookie", "nft"}

func importFindings(f *file) (out []string) {
	i := slices.IndexFunc(rules, func(r rule) bool {
		return within(f.dir, r.dirs...) && (!r.exact || slices.Contains(r.dirs, f.dir))
	})
	if i < 0 {
		return []string{finding(f, "no rule covers this directory")}
	}
	for p := range f.imports {
		dir := ours(p)
		switch {
		case p == "C":
			out = append(out, finding(f, "uses cgo: Weir cross-compiles for routers"))
		case dir != "":
			if dir == f.dir || within(dir, rules[i].may...) {
				continue
			}
			if f.test && (within(dir, rules[i].tests...) || within(dir, testHelpers...)) {
				continue
			}
			out = append(out, finding(f, "imports %s, which its directory may not", dir))
		case !f.test && within(f.dir, "module", "policies") && !within(f.dir, kernelDirs...):
			for _, k := range kernelImports {
				if p == k || strings.HasPrefix(p, k+"/") {
					out = append(out, finding(f, "imports %s: only %s touch the kernel", p, strings.Join(kernelDirs, ", ")))
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

func TestImports(t *testing.T) {
	for _, f := range tree(t) {
		report(t, importFindings(f))
	}
}

// TestImportsControl is the negative control.
func TestImportsControl(t *testing.T) {
	for _, c := range []struct{ path, imports, want string }{
		{"policies/sdk.go", modulePath + "/module/packet", "imports module/packet"},
		{"policies/sdk_test.go", modulePath + "/module", "imports module"},
		{"plugins/path/main.go", modulePath + "/plugins/host", "imports plugins/host"},
		{"module/divert/x.go", modulePath + "/module/engine", "imports module/engine"},
		{"module/config/x.go", modulePath + "/module/farm", "imports module/farm"},
		{"module/pool/x.go", modulePath + "/module/engine", "imports module/engine"},
		{"module/control/x.go", "golang.org/x/sys/unix", "only module/divert"},
		{"module/run.go", "github.com/google/nftables/expr", "only module/divert"},
		{"module/run.go", modulePath + "/integration/lab", "imports integration/lab"},
		{"module/run.go", modulePath + "/internal/require", "imports internal/require"},
		{"nft/x.go", modulePath + "/module/divert", "imports module/divert"},
		{"nft/x.go", "C", "cgo"},
		{"elsewhere/x.go", "fmt", "no rule"},
		{"nft/x.go", "golang.org/x/sys/unix", ""},
		{"module/run_test.go", modulePath + "/internal/require", ""},
		{"module/run.go", modulePath + "/nft", ""},
	} {
		f, err := parseSource(c.path, []byte("package x\nimport _ \""+c.imports+"\"\n"))
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(importFindings(f), "\n")
		if c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s importing %s: got %q, want %q", c.path, c.imports, got, c.want)
		}
	}
}
