// SPDX-License-Identifier: Apache-2.0

package continuity

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirgate/weir/integration/lab"
)

// A harm is something that happens to a file between a death and the next
// start.
type harm struct {
	name string
	do   func(rnd *rand.Rand, path string) error
	// spares: what it hits is single records, not the file.
	spares bool
}

// spots is how many bytes the harm "spots" writes.
const spots = 5

var harms = []harm{
	{"spots", func(rnd *rand.Rand, path string) error { return scribble(rnd, path, spots) }, true},
	{"random bytes", func(rnd *rand.Rand, path string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		b := make([]byte, min(st.Size(), 4<<20))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Write(b)
		return err
	}, false},
	{"truncated", func(rnd *rand.Rand, path string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, 1+rnd.Int64N(min(st.Size()-1, 1<<(4+rnd.IntN(28)))))
	}, false},
	{"empty", func(_ *rand.Rand, path string) error { return os.Truncate(path, 0) }, false},
	{"missing", func(_ *rand.Rand, path string) error { return os.Remove(path) }, false},
	{"foreign", func(_ *rand.Rand, path string) error {
		return os.WriteFile(path, bytes.Repeat([]byte("# a file of somebody else\n"), 1000), 0o644)
	}, false},
	{"a directory", func(_ *rand.Rand, path string) error {
		return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "with", "others"), 0o755))
	}, false},
	{"newer", newer, false},
}

// scribble changes n of the bytes that are not zero: what counts, and not the
// room for more.
func scribble(rnd *rand.Rand, path string, n int) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var used []int64
	page := make([]byte, 4096)
	for at := int64(0); ; {
		if at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA); err != nil {
			break // ENXIO: no more
		}
		k, err := f.ReadAt(page, at)
		for i, b := range page[:k] {
			if b != 0 {
				used = append(used, at+int64(i))
			}
		}
		if at += int64(k); err != nil {
			break
		}
	}
	if len(used) == 0 {
		return fmt.Errorf("%s is empty", path)
	}
	for range n {
		at := used[rnd.IntN(len(used))]
		if _, err := f.ReadAt(page[:1], at); err != nil {
			return err
		}
		page[0] ^= byte(1 + rnd.IntN(255))
		if _, err := f.WriteAt(page[:1], at); err != nil {
			return err
		}
	}
	return nil
}

// newer makes a file one of a program that is some versions ahead.
func newer(_ *rand.Rand, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !json.Valid(b) {
		// The second word of the head is the version of the records.
		binary.NativeEndian.PutUint32(b[12:], binary.NativeEndian.Uint32(b[12:])+7)
		return os.WriteFile(path, b[:8192], 0o600)
	}
	var x struct {
		Sum   string          `json:"sum"`
		State json.RawMessage `json:"state"`
	}
	if err := json.Unmarshal(b, &x); err != nil {
		return err
	}
	x.State = bytes.Replace(x.State, []byte(`"version":1`), []byte(`"version":8`), 1)
	sum := sha256.Sum256(x.State)
	x.Sum = hex.EncodeToString(sum[:])
	if b, err = json.Marshal(x); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// An old connection was there before the death.
type old struct {
	net.Conn
	br    *bufio.Reader
	half  bool // the beginning of a request is sent
	shard int
}

// older opens n connections that have made a request; every third one has
// begun the next one.
func (r *rig) older(n int) (list []*old) {
	r.t.Helper()
	for i := range n {
		c, err := r.Clients[0].Dial(within(r.t, 20*time.Second), "tcp", r.VIP().String())
		r.must(err)
		o := &old{Conn: c, br: bufio.NewReader(c)}
		r.must(o.ask("/first"))
		if i%3 == 0 {
			o.half = true
			_, err := io.WriteString(c, "GET /second HTTP/1.1\r\nHo")
			r.must(err)
		}
		list = append(list, o)
	}
	// A head that is begun is a record of its own; the server's connection is in
	// the pool.
	var flows map[string]flow
	r.until("all are known", func() bool {
		flows = r.flows()
		halves := 0
		for _, f := range flows {
			if f.Held > 0 {
				halves++
			}
		}
		return len(flows) >= n && halves >= (n+2)/3
	})
	for _, o := range list {
		o.shard = flows[o.LocalAddr().String()].Shard
	}
	return list
}

type flow struct {
	Client string `json:"client"`
	Shard  int    `json:"shard"`
	Held   int    `json:"held"`
}

// flows are the connections of clients that have a record, by their address.
func (r *rig) flows() map[string]flow {
	all := map[string]flow{}
	_, out := r.weir("flows", "-o", "json")
	for line := range strings.Lines(out) {
		var f flow
		if json.Unmarshal([]byte(line), &f) == nil {
			all[f.Client] = f
		}
	}
	return all
}

// errWrong says that there is an answer, to something else.
var errWrong = errors.New("wrong bytes")

func (o *old) ask(path string) error {
	if err := o.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	head := "GET " + path + " HTTP/1.1\r\nHost: farm\r\n\r\n"
	if o.half {
		o.half = false
		head = head[len("GET /second HTTP/1.1\r\nHo"):]
	}
	if _, err := io.WriteString(o, head); err != nil {
		return err
	}
	line, err := o.br.ReadString('\n')
	if err != nil {
		return err
	}
	length := 0
	for {
		field, err := o.br.ReadString('\n')
		if err != nil {
			return err
		}
		if v, ok := strings.CutPrefix(field, "Content-Length: "); ok {
			length, _ = strconv.Atoi(strings.TrimSpace(v))
		}
		if field == "\r\n" {
			break
		}
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(o.br, b); err != nil {
		return err
	}
	switch {
	case strings.HasPrefix(line, "HTTP/1.1 200 ") && strings.HasSuffix(string(b), " has "+path):
		return nil
	case strings.HasPrefix(line, "HTTP/1.1 4"), strings.HasPrefix(line, "HTTP/1.1 5"):
		return fmt.Errorf("%.60q", line)
	}
	return fmt.Errorf("%w: %.60q, %.100q", errWrong, line, b)
}

// said is what weir says about what it does not take over.
var said = regexp.MustCompile(`cannot be taken over|is damaged|cannot be used|refused=[1-9]|lost=[1-9]`)

// damaged is the store with a harm to it.
type damaged struct {
	harm *harm // nil: none
	file string
}

// round kills the engine, does harm, and looks at what the successor makes of
// it. supervised says that a supervisor starts it.
func (r *rig) round(rnd *rand.Rand, c lab.ConfigOptions, d damaged, supervised bool) {
	r.t.Helper()
	const conns = 12
	list := r.older(conns)
	defer func() {
		for _, o := range list {
			o.Close()
		}
	}()
	path := filepath.Join(r.run, "flows", d.file)
	hurt := func() {
		if d.harm != nil {
			r.must(d.harm.do(rnd, path))
		}
	}
	var from int
	pid := r.running()
	if supervised {
		// It must not be faster than the harm.
		from = len(r.w.Log())
		r.signal(r.w.Proc.Pid(), syscall.SIGSTOP)
		r.signal(pid, syscall.SIGKILL)
		r.until("the engine is dead", func() bool { return !alive(pid) })
		hurt()
		r.signal(r.w.Proc.Pid(), syscall.SIGCONT)
		pid = r.successor(pid)
	} else {
		r.must(r.w.Crash())
		hurt()
		r.launch(c)
		pid = r.running()
	}
	r.ask("/new")
	broken, elsewhere := 0, 0
	flows := r.flows()
	for i, o := range list {
		// Who has no record any more is not waited for: a young connection is
		// not reset at once, since its first segment might be late.
		err := errors.New("no record")
		if _, ok := flows[o.LocalAddr().String()]; ok {
			err = o.ask("/second")
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, errWrong):
			r.t.Errorf("connection %d: %v", i, err)
		}
		broken++
		if n, ok := strings.CutPrefix(d.file, "shard"); ok && n != strconv.Itoa(o.shard) {
			elsewhere++
		}
	}
	r.ask("/again")
	if now := r.running(); now != pid {
		r.t.Errorf("process %d serves, and it was %d", now, pid)
	}
	log := r.w.Log()[from:]
	if n := strings.Count(log, "the engine died"); supervised && n != 1 {
		r.t.Errorf("the engine died %d times", n)
	}
	_, events := r.weir("events")
	told := said.MatchString(log)
	switch {
	case d.harm == nil:
		if told || broken > 0 {
			r.t.Errorf("nothing is damaged, and %d connections are broken, it is told: %v", broken, told)
		}
	case !d.harm.spares && (!told || !said.MatchString(events)):
		r.t.Errorf("nobody says what is refused")
	case !d.harm.spares && broken == 0 && (d.file == "instance" || d.file == "shard0" && has(list, 0)):
		r.t.Errorf("the store is not what carries the connections")
	case broken > 0 && !told:
		r.t.Errorf("%d connections are broken, and nobody says why", broken)
	case elsewhere > 0:
		r.t.Errorf("%d connections are broken whose records are in another file", elsewhere)
	case broken > 0 && !strings.HasPrefix(d.file, "shard") && d.file != "instance":
		r.t.Errorf("%d connections are broken whose records are intact", broken)
	case d.harm.spares && broken > spots && !strings.Contains(log, "cannot be taken over; its connections are lost"):
		r.t.Errorf("%d connections are broken by %d bytes", broken, spots)
	}
	if r.t.Failed() {
		r.t.Fatalf("the store's %v; %d of %d connections are broken; it wrote:\n%s", d, broken, conns, log)
	}
}

// has tells whether one of the connections is of that shard.
func has(list []*old, shard int) bool {
	for _, o := range list {
		if o.shard == shard {
			return true
		}
	}
	return false
}

func (d damaged) String() string {
	if d.harm == nil {
		return "files are as they were"
	}
	return fmt.Sprintf("file %s is harmed: %s", d.file, d.harm.name)
}

// TestDamagedStore: whatever happens to the store's files between a death and
// the next start, that starts once, serves, and says what it refused;
// connections whose records are intact go on, and nobody ever gets bytes that
// are not his. Nothing is refused where nothing is damaged, and where all is,
// connections break: so the test can see both.
func TestDamagedStore(t *testing.T) {
	for _, supervised := range []bool{false, true} {
		t.Run(map[bool]string{false: "alone", true: "supervised"}[supervised], func(t *testing.T) { damageStore(t, supervised) })
	}
}

func damageStore(t *testing.T, supervised bool) {
	seed := rand.Uint64()
	if v, err := strconv.ParseUint(os.Getenv("WEIR_SEED"), 10, 64); err == nil {
		seed = v
	}
	t.Logf("WEIR_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 3))
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 2})
	c := loaded
	c.Extra = "queue: {shards: 2}\n"
	c.Pool += "\n    timeouts: {head: 10m, idle: 1h}" // However slow the machine is, only harm breaks a connection.
	if supervised {
		r.start(c)
	} else {
		r.launch(c)
	}
	r.round(rnd, c, damaged{}, supervised)
	files, err := filepath.Glob(filepath.Join(r.run, "flows", "*"))
	r.must(err)
	if len(files) < 5 {
		t.Fatalf("the store has the files %q", files)
	}
	var all []damaged
	for _, f := range files {
		name := filepath.Base(f)
		if name == "config" && !supervised {
			continue // Only a supervisor's child reads it.
		}
		for i := range harms {
			// Not every file has a version, or must be there.
			snapshot := strings.HasPrefix(name, "snapshot.")
			if harms[i].name == "newer" && (snapshot || name == "overrides" || name == "config") || harms[i].name == "missing" && (snapshot || name == "counters" || name == "overrides" || name == "config") {
				continue
			}
			all = append(all, damaged{&harms[i], name})
		}
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	n := 10
	if os.Getenv("WEIR_SOAK") != "" {
		n = 300
	}
	for i := range n {
		d := all[i%len(all)]
		r.until("there is a file "+d.file, func() bool {
			st, err := os.Stat(filepath.Join(r.run, "flows", d.file))
			return err == nil && st.Size() > 0
		})
		r.round(rnd, c, d, supervised)
	}
	r.round(rnd, c, damaged{}, supervised)
	r.stop()
}
