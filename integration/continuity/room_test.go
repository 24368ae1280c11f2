// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// small puts a tmpfs of that many bytes in the place of the run-time directory.
func (r *rig) small(size int64) {
	r.t.Helper()
	r.must(unix.Mount("weir-room", r.run, "tmpfs", 0, fmt.Sprintf("size=%d,mode=755", size)))
	r.t.Cleanup(func() {
		if err := unix.Unmount(r.run, unix.MNT_DETACH); err != nil {
			r.t.Errorf("unmount %s: %v", r.run, err)
		}
	})
}

// fill leaves no room in the run-time directory, until the result is called.
func (r *rig) fill() (free func()) {
	r.t.Helper()
	path := filepath.Join(r.run, "somebody-elses")
	f, err := os.Create(path)
	r.must(err)
	b := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(b)
	}
	if !errors.Is(err, unix.ENOSPC) {
		r.t.Fatal(err)
	}
	r.must(f.Close())
	return func() { r.must(os.Remove(path)) }
}

// TestStartWithoutRoom: a start that finds too little room for what it keeps
// serves all the same and says so, or ends, says so, and leaves nothing.
func TestStartWithoutRoom(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	served := 0
	for _, kib := range []int64{4, 16, 32, 64, 256, 1024, 2048, 4096} {
		t.Run(fmt.Sprint(kib), func(t *testing.T) {
			was := r.t
			defer func() { r.t = was }()
			r.t = t
			r.small(kib << 10)
			c := withPath
			c.Dir = r.run
			w, err := lab.StartWeir(within(t, 30*time.Second), r.Router, lab.WeirOptions{
				Binary: r.bin, Config: r.Config(c), Dir: r.dir, Socket: c.Socket(),
			})
			if err != nil {
				if !strings.Contains(err.Error(), "exit code 1") || !strings.Contains(err.Error(), "no space left") {
					t.Errorf("it does not say what is missing: %v", err)
				}
				r.same("after a failed start")
				return
			}
			served++
			r.w = w
			r.running()
			for range 3 {
				r.ask("/x")
			}
			if _, out := r.weir("events"); !strings.Contains(out, "no-store") {
				t.Errorf("no event tells that there is no room:\n%s\n%s", out, w.Log())
			}
			// Without its records a death ends the connections, and nothing else.
			r.must(w.Crash())
			r.launch(withPath)
			r.ask("/y")
			r.stop()
		})
	}
	if served < 5 {
		t.Errorf("only %d starts came to something", served)
	}
}

// TestRoomRunsOut: somebody fills the run-time directory while connections run,
// and more come than the store has memory for. Those are refused, and it is
// told; those that are established go on, over deaths too. When there is room
// again, all is as before.
func TestRoomRunsOut(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2, NoIPv6: true})
	r.small(32 << 20)
	l := &leavers{r: r}
	r.streams = l
	c := loaded
	c.Dir = r.run
	// The clients who take the room shall stay.
	patient := strings.Replace(r.Config(c), "    protocol: http\n", "    protocol: http\n    timeouts: {head: 10m, idle: 10m}\n", 1)
	r.launchText(patient, "--supervise")
	pid := r.serving()
	for i := range 4 {
		l.begin(fmt.Sprintf("download%d", i), r.VIP(), false)
	}
	idle, err := r.Clients[0].Dial(within(t, 20*time.Second), "tcp", r.VIP().String())
	r.must(err)
	defer idle.Close()
	ask := func(when string) {
		t.Helper()
		if err := exchange(idle, bufio.NewReader(idle), "GET", "/idle", ""); err != nil {
			t.Fatalf("a connection that is used now and then, %s: %v", when, err)
		}
	}
	l.flow("at first")
	ask("at first")
	free := r.fill()

	// Clients whose request has begun, until one is refused.
	const most, burst = 20000, 400
	var mu sync.Mutex
	var open []net.Conn
	leave := func() {
		for _, c := range open {
			c.Close()
		}
	}
	defer leave()
	begin := func() (refused int) {
		var group sync.WaitGroup
		for range burst {
			group.Go(func() {
				conn, err := r.Clients[0].Dial(within(t, 20*time.Second), "tcp", r.VIP().String())
				if err == nil {
					err = begun(conn)
				}
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					refused++
				} else {
					open = append(open, conn)
				}
			})
		}
		group.Wait()
		return refused
	}
	for refused := 0; refused == 0; refused = begin() {
		if len(open) > most {
			t.Fatalf("%d clients, and none is refused: there was room", len(open))
		}
	}
	full := len(open)
	r.until("it is told", func() bool { _, out := r.weir("events"); return strings.Contains(out, "table-full") })
	l.flow("while others are refused")
	ask("while others are refused")
	for range 2 {
		r.signal(pid, syscall.SIGKILL)
		pid = r.successor(pid)
		l.flow("after a death without room")
		ask("after a death without room")
	}
	free()
	// What lacked memory is asked for again, if not at every packet.
	r.until("more clients than before", func() bool { return begin() < burst })
	t.Logf("%d clients without room, %d with it", full, len(open))
	r.signal(pid, syscall.SIGKILL)
	r.successor(pid)
	r.ask("/again")
	l.flow("after all")
	ask("after all")
	l.finish()
	leave()
	r.stop()
}

// begun sends a part of a head and finds out whether the client is refused.
func begun(conn net.Conn) error {
	if _, err := io.WriteString(conn, "GET /begun HTTP/1.1\r\n"); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return fmt.Errorf("it is answered, or refused: %w", err)
}
