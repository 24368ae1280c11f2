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
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// procNet is /proc/net of the calling thread's network namespace. /proc/net
// itself belongs to the process's first thread, which may be in another one.
const procNet = "/proc/thread-self/net"

// tcpListen is TCP_LISTEN of the kernel's socket states.
const tcpListen = 10

// socket is a TCP socket of this host.
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

// tcpListeners lists the TCP sockets that listen in the namespace of the
// calling thread. The kernel is asked for these alone: a router may have very
// many connections, and /proc has one line for each.
func tcpListeners() ([]socket, error) {
	all, err := dumpListeners()
	if err == nil {
		return all, nil
	}
	// A kernel without INET_DIAG, or a process that may not make such sockets.
	all, err = tcpSockets(procNet)
	return slices.DeleteFunc(all, func(s socket) bool { return !s.listens() }), err
}

// Sizes and places of struct inet_diag_req_v2 and struct inet_diag_msg,
// linux/inet_diag.h. Both begin with four single bytes.
const (
	diagRequestLen = 56
	diagStates     = 4 // of the request: bit mask, 32 bits
	diagMessageLen = 72
	diagPort       = 4 // of the message: port and address of this end
	diagAddress    = 8
	diagInode      = 68
)

// diagRequest is a struct inet_diag_req_v2, all but the header.
type diagRequest [diagRequestLen]byte

// Len and Serialize implement nl.NetlinkRequestData.
func (r *diagRequest) Len() int          { return len(r) }
func (r *diagRequest) Serialize() []byte { return r[:] }

// dumpListeners asks SOCK_DIAG. When no other state than LISTEN is asked for,
// the kernel does not walk through the table of connections.
func dumpListeners() ([]socket, error) {
	var all []socket
	for _, family := range [...]uint8{unix.AF_INET, unix.AF_INET6} {
		var body diagRequest
		body[0], body[1] = family, unix.IPPROTO_TCP
		binary.NativeEndian.PutUint32(body[diagStates:], 1<<tcpListen)
		req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		req.AddData(&body)
		msgs, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
		if err != nil {
			return nil, fmt.Errorf("nft: asking for listeners: %w", err)
		}
		for _, m := range msgs {
			s, ok := parseDiag(m)
			if !ok {
				return nil, errors.New("nft: asking for listeners: a message that is too short or of another family")
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// parseDiag reads a struct inet_diag_msg.
func parseDiag(b []byte) (s socket, ok bool) {
	if len(b) < diagMessageLen {
		return s, false
	}
	var addr netip.Addr
	switch b[0] {
	case unix.AF_INET:
		addr = netip.AddrFrom4([4]byte(b[diagAddress:]))
	case unix.AF_INET6:
		addr = netip.AddrFrom16([16]byte(b[diagAddress:])).Unmap()
	default:
		return s, false
	}
	return socket{
		local: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[diagPort:])), state: b[1],
		inode: uint64(binary.NativeEndian.Uint32(b[diagInode:])),
	}, true
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
