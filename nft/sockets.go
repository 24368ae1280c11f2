// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// procNet is /proc/net of the calling thread's network namespace. /proc/net
// itself belongs to the process's first thread, which may be in another one.
const procNet = "/proc/thread-self/net"

// tcpListen is TCP_LISTEN of the kernel's socket states.
const tcpListen = 10

// socket is one line of /proc/net/tcp or tcp6.
type socket struct {
	local netip.AddrPort
	state uint8
	inode uint64
}

func (s *socket) listens() bool { return s.state == tcpListen }

// tcpSockets reads all TCP sockets of the namespace, of both families.
func tcpSockets(dir string) ([]socket, error) {
	var all []socket
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) && name == "tcp6" {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("nft: reading local sockets: %w", err)
		}
		part, err := parseSockets(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("nft: reading local sockets: %s: %w", name, err)
		}
		all = append(all, part...)
	}
	return all, nil
}

// parseSockets reads lines such as
//
//	0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 12345 …
//
// where an address is 32-bit words in the byte order of the machine.
func parseSockets(r io.Reader) ([]socket, error) {
	var out []socket
	sc := bufio.NewScanner(r)
	sc.Scan() // the heading
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 10 {
			continue
		}
		a, p, ok := strings.Cut(f[1], ":")
		raw, err1 := hex.DecodeString(a)
		port, err2 := strconv.ParseUint(p, 16, 16)
		state, err3 := strconv.ParseUint(f[3], 16, 8)
		inode, err4 := strconv.ParseUint(f[9], 10, 64)
		if err := errors.Join(err1, err2, err3, err4); err != nil || !ok || len(raw)%4 != 0 {
			return nil, fmt.Errorf("line %q: %w", sc.Text(), err)
		}
		for i := 0; i < len(raw); i += 4 {
			binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
		}
		addr, ok := netip.AddrFromSlice(raw)
		if !ok {
			return nil, fmt.Errorf("line %q: bad address", sc.Text())
		}
		out = append(out, socket{local: netip.AddrPortFrom(addr.Unmap(), uint16(port)), state: uint8(state), inode: inode})
	}
	return out, sc.Err()
}

// owner names the program that holds the socket with this inode, as far as
// this process may look: "nginx (pid 17)", or "" when it cannot tell.
func owner(inode uint64) string {
	want := fmt.Sprintf("socket:[%d]", inode)
	dirs, _ := filepath.Glob("/proc/[0-9]*/fd")
	for _, dir := range dirs {
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if target, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && target == want {
				return program(filepath.Base(filepath.Dir(dir)))
			}
		}
	}
	return ""
}

// program names a process, or gives "" when there is none.
func program(pid string) string {
	comm, err := os.ReadFile(filepath.Join("/proc", pid, "comm"))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
}

// byProgram is " by NAME (pid N)" or "".
func byProgram(name string) string {
	if name == "" {
		return " by another program"
	}
	return " by " + name
}
