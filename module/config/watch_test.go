// SPDX-License-Identifier: Apache-2.0

package config

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// told is one call of Changed with what a load gives then.
type told struct {
	err   error // of the call, or of the load
	level string
}

// follow watches layers and returns what is told. The pace is quick; nothing
// of the test depends on it but its own duration.
func follow(t *testing.T, poll time.Duration, layers LoadOptions) <-chan told {
	t.Helper()
	return followFrom(t, poll, layers, nil)
}

// followFrom does so beginning with what was loaded.
func followFrom(t *testing.T, poll time.Duration, layers LoadOptions, loaded *Config) <-chan told {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out := make(chan told, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		Watch(ctx, WatchOptions{
			Layers: func() LoadOptions { return layers }, Loaded: loaded, Settle: 20 * time.Millisecond, Poll: poll,
			Changed: func(err error) {
				x := told{err: err}
				if err == nil {
					cfg, err := Reload(layers)
					if x.err = err; err == nil {
						x.level = cfg.Log.Level
					}
				}
				out <- x
			},
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
	return out
}

// until waits for a call that has this level, or this text in its error, and
// returns how many came before it.
func (w waiter) until(level, text string) {
	w.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case x := <-w.c:
			switch {
			case level != "" && x.err == nil && x.level == level:
				return
			case text != "" && x.err != nil && strings.Contains(x.err.Error(), text):
				var l Errors
				if !errors.As(x.err, &l) {
					w.t.Errorf("error of type %T", x.err)
				}
				return
			}
		case <-deadline:
			w.t.Fatalf("never told: level %q, error %q", level, text)
		}
	}
}

type waiter struct {
	t *testing.T
	c <-chan told
}

func atLevel(level string) string {
	return "source: {addresses: [198.51.100.1]}\nlog: {level: " + level + "}\n"
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestWatch changes a file in every way that people and programs do.
func TestWatch(t *testing.T) {
	for _, poll := range []time.Duration{time.Hour, 30 * time.Millisecond} {
		name := "notified"
		if poll < time.Hour {
			name = "polled too"
		}
		t.Run(name, func(t *testing.T) { testWatch(t, poll) })
	}
}

func testWatch(t *testing.T, poll time.Duration) {
	dir := t.TempDir()
	file := filepath.Join(dir, "weir.yaml")
	put(t, file, atLevel("info"))
	w := waiter{t, follow(t, poll, LoadOptions{Files: []string{file}})}
	w.until("info", "")

	// In place, as cp and many editors write.
	put(t, file, atLevel("debug"))
	w.until("debug", "")

	// Renamed over, as mv and vi with backupcopy=no write.
	put(t, file+".new", atLevel("warn"))
	must(t, os.Rename(file+".new", file))
	w.until("warn", "")
	// And once more: a watch of the file itself would be lost by now.
	put(t, file+".new", atLevel("error"))
	must(t, os.Rename(file+".new", file))
	w.until("error", "")

	// vi with a backup: the old file is moved away, a new one written.
	must(t, os.Rename(file, file+"~"))
	put(t, file, atLevel("info"))
	w.until("info", "")

	// Truncated, then written in pieces.
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
	must(t, err)
	w.until("", "the file is empty")
	_, err = f.WriteString(atLevel("debug")[:20])
	must(t, err)
	_, err = f.WriteString(atLevel("debug")[20:])
	must(t, err)
	must(t, f.Close())
	w.until("debug", "")

	// Missing for a while, then back.
	must(t, os.Remove(file))
	w.until("", "no such file")
	put(t, file, atLevel("warn"))
	w.until("warn", "")

	// Broken, then right.
	put(t, file, "log: {level: [\n")
	w.until("", "not valid YAML")
	put(t, file, atLevel("error"))
	w.until("error", "")

	// The directory itself is replaced.
	must(t, os.Rename(dir, dir+".old"))
	t.Cleanup(func() { _ = os.RemoveAll(dir + ".old") })
	w.until("", "no such file")
	must(t, os.Mkdir(dir, 0o755))
	put(t, file, atLevel("info"))
	w.until("info", "")
}

// TestWatchLinks swaps a symbolic link as a cluster's configuration volumes
// do: file -> ..data/file, ..data -> version.
func TestWatchLinks(t *testing.T) {
	dir := t.TempDir()
	version := func(name, level string) {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		put(t, filepath.Join(dir, name, "weir.yaml"), atLevel(level))
	}
	swap := func(name string) {
		must(t, os.Symlink(name, filepath.Join(dir, "..tmp")))
		must(t, os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")))
	}
	version("..1", "info")
	swap("..1")
	file := filepath.Join(dir, "weir.yaml")
	must(t, os.Symlink("..data/weir.yaml", file))
	// A link from elsewhere leads to it.
	far := filepath.Join(t.TempDir(), "link.yaml")
	must(t, os.Symlink(file, far))
	w := waiter{t, follow(t, time.Hour, LoadOptions{Files: []string{far}})}
	w.until("info", "")
	for i, level := range []string{"debug", "warn", "error"} {
		name := "..v" + string(rune('a'+i))
		version(name, level)
		swap(name)
		w.until(level, "")
	}
	// The file behind all the links is written in place.
	put(t, filepath.Join(dir, "..vc", "weir.yaml"), atLevel("info"))
	w.until("info", "")
	must(t, os.Remove(filepath.Join(dir, "..data")))
	w.until("", "no such file")
	swap("..vb")
	w.until("warn", "")
}

// TestWatchDirectory: files come and go in conf.d, which may be absent.
func TestWatchDirectory(t *testing.T) {
	dir := t.TempDir()
	file, confd := filepath.Join(dir, "weir.yaml"), filepath.Join(dir, "conf.d")
	put(t, file, atLevel("info"))
	w := waiter{t, follow(t, time.Hour, LoadOptions{Files: []string{file}, Dir: confd})}
	w.until("info", "")
	must(t, os.Mkdir(confd, 0o755))
	put(t, filepath.Join(confd, "10.yaml"), "log: {level: debug}\n")
	w.until("debug", "")
	put(t, filepath.Join(confd, ".20.yaml.swp"), "nonsense")
	put(t, filepath.Join(confd, "20.yaml"), "log: {level: warn}\n")
	w.until("warn", "")
	must(t, os.Remove(filepath.Join(confd, "20.yaml")))
	w.until("debug", "")
	must(t, os.RemoveAll(confd))
	w.until("info", "")
}

// TestWatchQuiet: what leaves the contents as they are is not told.
func TestWatchQuiet(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "weir.yaml")
	put(t, file, atLevel("info"))
	c := follow(t, 5*time.Millisecond, LoadOptions{Files: []string{file}})
	w := waiter{t, c}
	w.until("info", "")
	for range 20 {
		put(t, file+".new", atLevel("info"))
		must(t, os.Rename(file+".new", file))
		must(t, os.Chtimes(file, time.Now(), time.Now()))
		put(t, filepath.Join(dir, "noise"), time.Now().String())
	}
	put(t, file, atLevel("debug"))
	select {
	case x := <-c:
		if x.level != "debug" {
			t.Errorf("told without a change: %+v", x)
		}
	case <-time.After(20 * time.Second):
		t.Error("a change was not told")
	}
}

// TestWatchLoaded: what a start has loaded is not told as if it were news, but
// what changed since that load is, and so is a way back to it.
func TestWatchLoaded(t *testing.T) {
	dir := t.TempDir()
	file, confd := filepath.Join(dir, "weir.yaml"), filepath.Join(dir, "conf.d")
	put(t, file, atLevel("info"))
	must(t, os.Mkdir(confd, 0o755))
	put(t, filepath.Join(confd, "10.yaml"), "queue: {gso: false}\n")
	layers := LoadOptions{Files: []string{file}, Dir: confd}
	loaded, err := Load(layers)
	must(t, err)
	calls := 0
	w := newWatcher(WatchOptions{
		Layers: func() LoadOptions { return layers }, Loaded: loaded,
		Changed: func(err error) { must(t, err); calls++ },
	})
	after := func(what string, want int) {
		t.Helper()
		for w.look() {
		}
		if calls != want {
			t.Errorf("%s: told %d times, want %d", what, calls, want)
		}
	}
	after("as it was loaded", 0)
	put(t, file, atLevel("debug"))
	after("changed", 1)
	put(t, file, atLevel("info"))
	after("as it was loaded, once more", 2)
	put(t, filepath.Join(confd, "20.yaml"), "log: {level: warn}\n")
	w, calls = newWatcher(w.o), 0
	after("a file more since the load", 1)

	// And the whole way: what is told first is a change.
	must(t, os.Remove(filepath.Join(confd, "20.yaml")))
	c := followFrom(t, time.Millisecond, layers, loaded)
	put(t, file, atLevel("error"))
	select {
	case x := <-c:
		if x.err != nil || x.level != "error" {
			t.Errorf("told %+v first, want level error", x)
		}
	case <-time.After(20 * time.Second):
		t.Error("never told: level error")
	}
}

// TestReloadEmpty: an empty file is no configuration for a running instance,
// though it is one for a start.
func TestReloadEmpty(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
	put(t, good, atLevel("info"))
	put(t, bad, "\n\n")
	opts := LoadOptions{Files: []string{good, bad}}
	if _, err := Load(opts); err != nil {
		t.Errorf("Load: %v", err)
	}
	if _, err := Reload(opts); err == nil || !strings.Contains(err.Error(), "b.yaml: the file is empty") {
		t.Errorf("Reload: %v", err)
	}
	put(t, bad, "farms: []\n")
	if _, err := Reload(opts); err != nil {
		t.Errorf("Reload: %v", err)
	}
}
