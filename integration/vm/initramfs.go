// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// An image is an initial RAM disk in the making: files by their path without
// the leading slash.
type image struct {
	files map[string]file
}

type file struct {
	mode uint32 // as in stat: type and permissions
	data []byte
}

const (
	modeDir  = 0o040755
	modeExec = 0o100755
	modeFile = 0o100644
	modeLink = 0o120777
)

func newImage() *image {
	m := &image{files: map[string]file{}}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "run", "sbin", "bin", "lib", "etc"} {
		m.files[d] = file{mode: modeDir}
	}
	return m
}

// add puts a file in place, with the directories above it.
func (m *image) add(name string, mode uint32, data []byte) {
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		if _, ok := m.files[d]; !ok {
			m.files[d] = file{mode: modeDir}
		}
	}
	m.files[name] = file{mode: mode, data: data}
}

func (m *image) link(name, to string) { m.add(name, modeLink, []byte(to)) }

// A module is a kernel module and what its own description says.
type module struct {
	name    string
	file    string // below /lib/modules
	depends []string
	aliases []string
	data    []byte
}

// readModule reads a module's .modinfo section: strings "key=value", each
// ended by a zero byte.
func readModule(p string) (*module, error) {
	b, err := os.ReadFile(p)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("%s: no .modinfo", p)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	m := &module{data: b, file: filepath.Base(p), name: moduleName(filepath.Base(p))}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			if value != "" {
				m.depends = strings.Split(value, ",")
			}
		case "alias":
			m.aliases = append(m.aliases, value)
		}
	}
	return m, nil
}

// moduleName is how the kernel calls a module: underscores, no ending.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(file, ".ko"), "-", "_")
}

// wanted says which modules the guest may need. Their dependencies come along.
func wanted(name string) bool {
	for _, p := range []string{"nft_", "nf_", "nfnetlink", "xt_NFQUEUE", "sch_netem", "sch_ingress", "cls_bpf", "act_bpf", "veth", "bridge", "crc32c_generic", "crc32c_intel", "libcrc32c"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// Modules adds the kernel modules below dir that the guest may need, and an
// index for its modprobe: a line "module NAME FILE DEPENDENCY,…" for each, and
// a line "alias PATTERN NAME" for each of its aliases.
func (m *image) modules(dir string) error {
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasSuffix(p, ".ko") {
			all[moduleName(filepath.Base(p))] = p
		}
		return err
	})
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return fmt.Errorf("%s: no kernel modules (*.ko)", dir)
	}
	var index strings.Builder
	done := map[string]bool{}
	var take func(name string) error
	take = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		if done[name] || all[name] == "" {
			return nil // taken, or built in
		}
		done[name] = true
		k, err := readModule(all[name])
		if err != nil {
			return err
		}
		m.add("lib/modules/"+k.file, modeFile, k.data)
		fmt.Fprintf(&index, "module %s %s %s\n", k.name, k.file, strings.Join(k.depends, ","))
		for _, a := range k.aliases {
			fmt.Fprintf(&index, "alias %s %s\n", a, k.name)
		}
		for _, d := range k.depends {
			if err := take(d); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if wanted(name) {
			if err := take(name); err != nil {
				return err
			}
		}
	}
	m.add("lib/modules/index", modeFile, []byte(index.String()))
	return nil
}

// write writes the image as a compressed cpio archive of the "new ASCII" form
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func (m *image) write(w io.Writer) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	c := cpio{w: z}
	for _, name := range slices.Sorted(maps.Keys(m.files)) {
		c.entry(name, m.files[name])
	}
	// The kernel opens it for the first process before that can make it.
	c.device("dev/console", 5, 1)
	c.entry("TRAILER!!!", file{})
	return errors.Join(c.err, z.Close())
}

type cpio struct {
	w     io.Writer
	inode uint32
	err   error
}

func (c *cpio) entry(name string, f file) { c.header(name, f.mode, 0, 0, f.data) }

func (c *cpio) device(name string, major, minor uint32) {
	const charDevice = 0o020600
	c.header(name, charDevice, major, minor, nil)
}

func (c *cpio) header(name string, mode, major, minor uint32, data []byte) {
	c.inode++
	links := uint32(1)
	if mode == modeDir {
		links = 2
	}
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
	c.write([]byte(head))
	c.pad(len(head))
	c.write(data)
	c.pad(len(data))
}

func (c *cpio) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
}

func (c *cpio) pad(n int) { c.write(make([]byte, (4-n%4)%4)) }
