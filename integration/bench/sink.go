// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// This file is the server that uploads go to. It takes a body away without
// copying it, and answers when it has all of it: a server that answers earlier
// ends the connection of whoever would go on to send.

// runSink serves uploads until it is killed. It writes one line when it
// listens.
func runSink(args []string, w io.Writer) error {
	fs := flag.NewFlagSet("sink", flag.ContinueOnError)
	addr := fs.String("listen", "", "address and port")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	fmt.Fprintln(w, "listening")
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := swallow(c.(*net.TCPConn)); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				fmt.Fprintln(os.Stderr, "sink:", err)
			}
		}()
	}
}

// swallow serves the requests of one connection.
func swallow(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	r := bufio.NewReader(c)
	waste := make([]byte, 1<<20)
	for {
		if _, err := r.ReadString('\n'); err != nil {
			return err
		}
		head, err := textproto.NewReader(r).ReadMIMEHeader()
		if err != nil {
			return err
		}
		left, err := strconv.Atoi(head.Get("Content-Length"))
		if err != nil {
			return fmt.Errorf("a request without a length: %w", err)
		}
		n, err := r.Discard(min(left, r.Buffered()))
		if err != nil {
			return err
		}
		for left -= n; left > 0; left -= n {
			if left < len(waste) {
				waste = waste[:left]
			}
			var failed error
			err := raw.Read(func(fd uintptr) bool {
				n, _, failed = unix.Recvfrom(int(fd), waste, unix.MSG_TRUNC|unix.MSG_DONTWAIT)
				return !errors.Is(failed, unix.EAGAIN)
			})
			if err = errors.Join(err, failed); err != nil {
				return err
			}
			if n == 0 {
				return io.ErrUnexpectedEOF
			}
		}
		waste = waste[:cap(waste)]
		answer := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
		if strings.EqualFold(head.Get("Connection"), "close") {
			answer += "Connection: close\r\n"
		}
		if _, err := io.WriteString(c, answer+"\r\nok"); err != nil || strings.Contains(answer, "close") {
			return err
		}
	}
}
