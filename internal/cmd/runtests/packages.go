// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// testPackage is what go list says about a package with tests.
type testPackage struct {
	ImportPath   string
	Dir          string
	TestGoFiles  []string
	XTestGoFiles []string
	TestImports  []string
	XTestImports []string

	// kernel: the tests ask for privileges or features of the kernel.
	kernel bool
}

// list returns the packages that have tests and were asked for.
func list(ctx context.Context, o *options) ([]testPackage, error) {
	out, err := goOutput(ctx, o, "list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles,TestImports,XTestImports", "./...")
	if err != nil {
		return nil, err
	}
	return decode(out, o.only)
}

// goOutput runs the go command and returns what it prints; its complaints are in
// the error.
func goOutput(ctx context.Context, o *options, args ...string) ([]byte, error) {
	c := command(ctx, o.goCommand, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", o.goCommand, args[0], err, stderr.Bytes())
	}
	return out, nil
}

func decode(out []byte, only string) ([]testPackage, error) {
	var pkgs []testPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p testPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("output of go list: %w", err)
		}
		if len(p.TestGoFiles)+len(p.XTestGoFiles) == 0 || !wanted(p.ImportPath, only) {
			continue
		}
		for _, i := range slices.Concat(p.TestImports, p.XTestImports) {
			if strings.HasSuffix(i, "/internal/require") || strings.HasSuffix(i, "/integration/lab") {
				p.kernel = true
			}
		}
		pkgs = append(pkgs, p)
	}
	return pkgs, nil
}

func wanted(path, only string) bool {
	if only == "" {
		return true
	}
	for part := range strings.SplitSeq(only, ",") {
		if part != "" && strings.Contains(path, part) {
			return true
		}
	}
	return false
}
