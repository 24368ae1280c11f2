// SPDX-License-Identifier: Apache-2.0

package module

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/weirgate/weir/module/config"
	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/flowstore"
	"github.com/weirgate/weir/module/splice"
	"github.com/weirgate/weir/policies/snapshot"
)

// This file is what outlives the instance: the flow stores of the shards, and
// what their records mean. All of it lives in the folder "flows" of
// runtime_dir, under the instance's lock, and goes with an orderly stop.

// ErrRevoked says that another process serves the flows now. The instance
// leaves everything as it is: it belongs to the other one.
var ErrRevoked = errors.New("another process has taken over the flows")

// keeping is what a module knows about what outlives it.
type keeping struct {
	sync.Mutex
	dir    string
	state  kept
	disk   []byte // the file "instance" as this process knows it
	stores []*flowstore.Memory
	// heir: there was a predecessor, and what it left is worth something.
	heir bool
	// discard: the instance stopped in order, nobody is to take over.
	discard bool
	took    engine.Takeover
	written map[[2]string]*snapshot.Snapshot // snapshots as they are on disk
}

// kept is the file "instance": what the numbers in the records mean.
type kept struct {
	Version int    `json:"version"`
	Boot    string `json:"boot"` // life of the host
	// Clock is the engines' time at the host's time since its start.
	Clock   int64        `json:"clock"`
	Since   int64        `json:"since"`
	Secret  string       `json:"secret"` // of the cookies
	Shards  int          `json:"shards"`
	Numbers farm.Numbers `json:"numbers"`
	Drains  []keptDrain  `json:"drains,omitempty"`
}

const keptVersion = 1

// recall reads what a predecessor left. Whatever cannot be used is left aside
// with a word in the log: the instance serves all the same.
func (m *Module) recall(give *undo) error {
	k := &m.keep
	k.dir = filepath.Join(m.config().RuntimeDir, "flows")
	if st, err := os.Lstat(k.dir); err == nil && !st.IsDir() {
		m.refused(k.dir + " is no directory")
		_ = os.Remove(k.dir)
	}
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return fmt.Errorf("runtime_dir: %w", err)
	}
	give.add(m.leaveStores)
	k.written = map[[2]string]*snapshot.Snapshot{}
	k.discard = true // until there is something that another start may want
	b, err := os.ReadFile(filepath.Join(k.dir, "instance"))
	switch {
	case errors.Is(err, os.ErrNotExist):
		if left, _ := filepath.Glob(filepath.Join(k.dir, "shard*")); len(left) > 0 {
			return m.forget("the file \"instance\" is missing")
		}
		return m.forget("")
	case err != nil:
		return m.forget(err.Error())
	}
	var old kept
	if err := unseal(b, &old); err != nil {
		return m.forget("the file \"instance\" is damaged: " + err.Error())
	}
	secret, err := hex.DecodeString(old.Secret)
	switch {
	case old.Version != keptVersion:
		return m.forget(fmt.Sprintf("it is of version %d, this program knows %d", old.Version, keptVersion))
	case old.Boot != flowstore.HostLife():
		return m.forget("the host was started anew since")
	case err != nil || len(secret) != len(m.secret):
		return m.forget("the file \"instance\" is damaged: no secret")
	case old.Since > flowstore.HostTime():
		return m.forget("the file \"instance\" is damaged: it is from the future")
	}
	k.discard = false
	k.state, k.disk, k.heir = old, b, true
	copy(m.secret[:], secret)
	m.clock = clock{time.Now(), old.Clock + flowstore.HostTime() - old.Since}
	m.recallSnapshots()
	spec, err := m.spec()
	if err != nil {
		return err
	}
	db, err := farm.Build(farm.Recall(old.Numbers), spec)
	if err != nil {
		return err
	}
	if err := m.remember(db); err != nil {
		return err
	}
	m.db.Store(db)
	return nil
}

// forget begins anew. why says what is wrong with what was found, if anything
// was.
func (m *Module) forget(why string) error {
	if why != "" {
		m.refused(why)
	}
	k := &m.keep
	all, _ := filepath.Glob(filepath.Join(k.dir, "*"))
	for _, p := range all {
		if filepath.Base(p) != "config" { // This start, or the next one, may depend on it.
			_ = os.RemoveAll(p)
		}
	}
	k.disk = nil
	k.state = kept{
		Version: keptVersion, Boot: flowstore.HostLife(), Clock: m.clock.now(), Since: flowstore.HostTime(), Secret: hex.EncodeToString(m.secret[:]),
	}
	return m.remember(m.db.Load())
}

func (m *Module) refused(why string) {
	m.log.Warn("what a predecessor left cannot be taken over; its connections are lost", "why", why)
	m.events.Add(control.Event{Name: control.EventTakeover, Text: "what a predecessor left cannot be taken over: " + why})
}

// remember writes down what the numbers of a database mean, before records
// use them. What is there already is not written again: that needs room, and a
// successor must not be lost for want of it.
func (m *Module) remember(db *farm.DB) error {
	k := &m.keep
	if k.dir == "" {
		return nil // not running yet
	}
	k.Lock()
	defer k.Unlock()
	k.state.Numbers = db.Numbers()
	b, err := seal(&k.state)
	if err != nil || bytes.Equal(b, k.disk) {
		return err
	}
	if err := replaceFile(filepath.Join(k.dir, "instance"), b); err != nil {
		return err
	}
	k.disk = b
	return nil
}

// sealed is how the small files are written: a changed digit would still be
// JSON, and connections would go on to another server.
type sealed struct {
	Sum   string          `json:"sum"` // SHA-256 of what follows, in hexadecimal
	State json.RawMessage `json:"state"`
}

var errSum = errors.New("its checksum is wrong")

func seal(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return json.Marshal(sealed{sum(b), b})
}

func unseal(b []byte, v any) error {
	var s sealed
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	if s.Sum != sum(s.State) {
		return errSum
	}
	return json.Unmarshal(s.State, v)
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// replaceFile writes a file so that a reader finds the old or the new one.
func replaceFile(path string, b []byte) error {
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		_ = os.Remove(path + ".new") // Where there is little room, half of a file takes the rest.
		return fmt.Errorf("runtime_dir: %w", err)
	}
	err := os.Rename(path+".new", path)
	if st, serr := os.Lstat(path); err != nil && serr == nil && st.IsDir() {
		// Nothing of ours is a directory.
		_ = os.RemoveAll(path)
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("runtime_dir: %w", err)
	}
	return nil
}

// store opens a store of the instance. A file that cannot be taken over makes
// room for a new one; where there is no room at all the result is nil, and what
// lives there goes with the process.
func (m *Module) store(name string) *flowstore.Memory {
	k := &m.keep
	path := filepath.Join(k.dir, name)
	mem, err := flowstore.Open(path, splice.RecordVersion)
	if errors.Is(err, flowstore.ErrRefused) {
		m.refused(err.Error())
		_ = os.RemoveAll(path)
		mem, err = flowstore.Open(path, splice.RecordVersion)
	} else if err == nil && k.heir && !mem.Found() {
		m.refused(fmt.Sprintf("the file %q is missing or empty", name))
	}
	if err != nil {
		m.noStore(name, err)
		return nil
	}
	k.stores = append(k.stores, mem)
	return mem
}

// noStore tells that there is no store of this name. What may lie there is
// removed: it takes room, and a successor must not believe it.
func (m *Module) noStore(name string, err error) {
	const text = "connections will not survive this process: there is no place for the flow store in runtime_dir"
	m.event(control.Event{Name: control.EventNoStore, Level: control.LevelWarn, Text: text + ": " + err.Error()})
	_ = os.RemoveAll(filepath.Join(m.keep.dir, name))
}

// shardEngine makes the engine of a shard and takes over what is there.
func (m *Module) shardEngine(opt engine.Options) (*engine.Engine, *flowstore.Memory) {
	name := fmt.Sprintf("shard%d", opt.Shard)
	for range 2 {
		mem := m.store(name)
		if mem == nil {
			break
		}
		e, err := engine.Open(opt, mem, m.db.Load())
		if err == nil {
			began := time.Now()
			took := e.Recover(m.clock.now())
			m.tookOver(opt.Shard, took, time.Since(began))
			return e, mem
		}
		m.keep.stores = m.keep.stores[:len(m.keep.stores)-1]
		mem.Close()
		if !errors.Is(err, flowstore.ErrRefused) {
			m.noStore(name, err)
			break
		}
		m.refused(err.Error())
		_ = os.RemoveAll(filepath.Join(m.keep.dir, name))
	}
	return engine.New(opt, m.db.Load()), nil
}

// keepHandshakes has the answered SYNs remembered beyond this process.
func (m *Module) keepHandshakes() {
	for range 2 {
		mem := m.store("handshakes")
		if mem == nil {
			return
		}
		err := m.handshake.Keep(mem)
		if err == nil {
			return
		}
		m.keep.stores = m.keep.stores[:len(m.keep.stores)-1]
		mem.Close()
		if !errors.Is(err, flowstore.ErrRefused) {
			m.noStore("handshakes", err)
			return
		}
		m.refused(err.Error())
		_ = os.RemoveAll(filepath.Join(m.keep.dir, "handshakes"))
	}
}

// keepShards notes the number of shards. Flows are spread over the queues by
// their number, so that another number makes every store worthless.
func (m *Module) keepShards(n int) {
	k := &m.keep
	if old := k.state.Shards; old != 0 && old != n {
		m.refused(fmt.Sprintf("there were %d shards, and there are %d now", old, n))
		files, _ := filepath.Glob(filepath.Join(k.dir, "shard*"))
		for _, p := range files {
			_ = os.RemoveAll(p)
		}
		k.heir = false
	}
	k.state.Shards = n
	if err := m.remember(m.db.Load()); err != nil {
		m.log.Warn("what a successor needs cannot be written", "error", err)
	}
}

func (m *Module) tookOver(shard int, t engine.Takeover, d time.Duration) {
	if !t.Any() {
		return
	}
	m.keep.took.Clients += t.Clients
	m.keep.took.Servers += t.Servers
	m.log.Info("taken over from a predecessor", "shard", shard, "clients", t.Clients, "servers", t.Servers, "idle", t.Idle,
		"embryos", t.Embryos, "tombstones", t.Tombs, "undone", t.Undone, "refused", t.Refused, "lost", t.Lost, "duration", d.Round(time.Microsecond))
	text := fmt.Sprintf("shard %d takes over %d client and %d server connections", shard, t.Clients, t.Servers)
	if t.Refused+t.Lost > 0 {
		text += fmt.Sprintf("; %d records are damaged, %d connections cannot go on", t.Refused, t.Lost)
	}
	m.events.Add(control.Event{Name: control.EventTakeover, Text: text})
}

// leaveStores lets the stores go. After an orderly stop, or when the rules are
// gone, nobody could use them.
func (m *Module) leaveStores() error {
	k := &m.keep
	for _, s := range k.stores {
		_ = s.Close()
	}
	k.stores = nil
	if k.discard {
		return os.RemoveAll(k.dir)
	}
	return nil
}

// owned reports whether no other process has taken over.
func (k *keeping) owned() bool {
	for _, s := range k.stores {
		if !s.Owned() {
			return false
		}
	}
	return true
}

// LastConfigPath is where an instance keeps the configuration that is in force,
// until it stops in order.
func LastConfigPath(runtimeDir string) string { return filepath.Join(runtimeDir, "flows", "config") }

// LastConfig reads such a file. What it says is as it was when the instance
// died: changes that waited for a restart wait on.
func LastConfig(path string) (*config.Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the configuration that was in force cannot be used: %w", err)
	}
	var text string
	if err := unseal(b, &text); err != nil {
		return nil, fmt.Errorf("the configuration that was in force, %s, is damaged: %w", path, err)
	}
	c, err := config.Parse(path, []byte(text))
	if err != nil {
		return nil, fmt.Errorf("the configuration that was in force, %s, cannot be used: %w", path, err)
	}
	return c, nil
}

// keepConfig writes the configuration down that is in force, run-time changes
// left out. The caller holds m.op.
func (m *Module) keepConfig() {
	if m.keep.dir == "" {
		return
	}
	text, err := m.op.file.Compact()
	var b []byte
	if err == nil {
		b, err = seal(string(text))
	}
	if err == nil {
		err = replaceFile(filepath.Join(m.keep.dir, "config"), b)
	}
	if err != nil {
		m.log.Warn("the configuration is not kept: after a death the files count", "error", err)
	}
}

// keepSnapshot writes down what a plugin said last, so that a successor chooses
// as before from its first packet on.
func (m *Module) keepSnapshot(farmName, plugin string, s *snapshot.Snapshot) {
	k := &m.keep
	k.Lock()
	defer k.Unlock()
	key := [2]string{farmName, plugin}
	if k.dir == "" || k.written[key] == s {
		return
	}
	k.written[key] = s
	b, err := seal(keptSnapshot{farmName, plugin, s})
	if err == nil {
		err = replaceFile(k.snapshotFile(key), b)
	}
	if err != nil {
		m.log.Warn("a policy's snapshot is not kept for a successor", "farm", farmName, "plugin", plugin, "error", err)
	}
}

type keptSnapshot struct {
	Farm     string             `json:"farm"`
	Plugin   string             `json:"plugin"`
	Snapshot *snapshot.Snapshot `json:"snapshot"`
}

// snapshotFile is a name that any farm and plugin can have.
func (k *keeping) snapshotFile(key [2]string) string {
	return filepath.Join(k.dir, "snapshot."+hex.EncodeToString([]byte(key[0]))+"."+hex.EncodeToString([]byte(key[1])))
}

// recallSnapshots reads the snapshots that a predecessor kept. Plugins replace
// them as they start.
func (m *Module) recallSnapshots() {
	files, _ := filepath.Glob(filepath.Join(m.keep.dir, "snapshot.*"))
	m.policies.Lock()
	defer m.policies.Unlock()
	for _, p := range files {
		var x keptSnapshot
		b, err := os.ReadFile(p)
		if err == nil {
			err = unseal(b, &x)
		}
		if err != nil || x.Snapshot == nil {
			m.log.Warn("a policy's snapshot of a predecessor is damaged; its plugin makes another", "file", p, "error", err)
			m.events.Add(control.Event{Name: control.EventTakeover, Text: "a policy's snapshot of a predecessor is damaged: " + filepath.Base(p)})
			_ = os.RemoveAll(p)
			continue
		}
		c := m.config().Farm(x.Farm)
		if c == nil || !usesPolicy(c, x.Plugin) {
			_ = os.Remove(p)
			continue
		}
		m.policies.last[[2]string{x.Farm, x.Plugin}] = x.Snapshot
	}
}
