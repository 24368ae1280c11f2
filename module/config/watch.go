// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

// WatchOptions say what Watch looks at.
type WatchOptions struct {
	// Layers names the files; it is asked anew each time, because files come
	// and go in directories. Must not be nil.
	Layers func() LoadOptions

	// Loaded is what Load has made of the files before, or nil. The first look
	// compares with it, so that what is in force already is not told once more,
	// and what changed between that load and now is.
	Loaded *Config

	// Changed is called when the files have other contents than at the last
	// call and have kept them for Settle, and once at the beginning unless they
	// are as Loaded had them. A file
	// that is absent, unreadable or empty is told as an error, an Errors, in
	// place of contents: there is nothing to load then. It runs on Watch's own
	// goroutine. Must not be nil.
	Changed func(error)

	Settle time.Duration // default 300 ms
	Poll   time.Duration // look at this pace even if nothing was notified; default 5 s
}

// Watch follows the files of a configuration until ctx ends. Editors write in
// place, rename over, or remove and create; clusters swap symbolic links;
// copies arrive in pieces. So a notification of the kernel is only a reason to
// look: what counts are the contents, and that they stay the same for a while.
// Directories are watched, not files, and looked for again each time. Where the
// kernel has no notifications left, polling alone does it.
func Watch(ctx context.Context, o WatchOptions) {
	if o.Settle <= 0 {
		o.Settle = 300 * time.Millisecond
	}
	if o.Poll <= 0 {
		o.Poll = 5 * time.Second
	}
	w := newWatcher(o)
	defer w.disarm()
	w.run(ctx)
}

func newWatcher(o WatchOptions) *watcher {
	w := &watcher{o: o}
	if o.Loaded != nil {
		w.told = &look{sums: o.Loaded.sums}
	}
	return w
}

type watcher struct {
	o      WatchOptions
	notify *fsnotify.Watcher // nil: polling alone
	armed  map[string]os.FileInfo

	told      *look // what Changed was called with last
	candidate *look // seen once, waits to be seen again
}

// look is what the files hold at one moment.
type look struct {
	sums map[string]checksum
	errs Errors
}

func (a *look) same(b *look) bool {
	return a != nil && b != nil && maps.Equal(a.sums, b.sums) && a.errs.Error() == b.errs.Error()
}

func (w *watcher) run(ctx context.Context) {
	poll := time.NewTicker(w.o.Poll)
	defer poll.Stop()
	settle := time.NewTimer(0)
	defer settle.Stop()
	pending := true
	// A stream of notifications must neither put the look off for ever nor
	// make it come more often.
	soon := func() {
		if !pending {
			pending = true
			settle.Reset(w.o.Settle)
		}
	}
	for {
		var events <-chan fsnotify.Event
		var failures <-chan error
		if w.notify != nil {
			events, failures = w.notify.Events, w.notify.Errors
		}
		select {
		case <-ctx.Done():
			return
		case <-events:
			soon()
		case <-failures:
			soon() // an overflow: something was missed
		case <-poll.C:
			soon()
		case <-settle.C:
			pending = false
			w.arm()
			if w.look() {
				soon()
			}
		}
	}
}

// look compares the files with what was told; again asks for another look.
func (w *watcher) look() (again bool) {
	now := w.read()
	switch {
	case now.same(w.told):
		w.candidate = nil
		return false
	case !now.same(w.candidate):
		w.candidate = now
		return true
	}
	w.told, w.candidate = now, nil
	if len(now.errs) > 0 {
		w.o.Changed(now.errs)
	} else {
		w.o.Changed(nil)
	}
	return false
}

// files lists the files of the layers as Load would read them. A directory
// without files is listed itself.
func (o *LoadOptions) files() []string {
	var out []string
	for _, f := range o.Files {
		list := []string{f}
		if st, err := os.Stat(f); err == nil && st.IsDir() {
			if inside := yamlFiles(f); len(inside) > 0 {
				list = inside
			}
		}
		out = append(out, list...)
	}
	if o.Dir != "" {
		out = append(out, yamlFiles(o.Dir)...)
	}
	return out
}

func (w *watcher) read() *look {
	opts := w.o.Layers()
	l := &look{sums: map[string]checksum{}}
	for _, f := range opts.files() {
		b, err := os.ReadFile(f)
		if err != nil {
			l.errs = append(l.errs, &Error{File: f, Problem: "cannot be read: " + reason(err), Expected: "a readable configuration file"})
			continue
		}
		if empty(b) {
			l.errs = append(l.errs, emptyError(f))
			continue
		}
		l.sums[f] = sha256.Sum256(b)
	}
	return l
}

// empty reports whether a file has nothing but white space: somebody is about
// to write it.
func empty(b []byte) bool { return len(bytes.TrimSpace(b)) == 0 }

func emptyError(file string) *Error {
	return &Error{File: file, Problem: "the file is empty", Expected: "a configuration; to serve nothing, write farms: []"}
}

// Reload is Load for a running instance: a file that is empty is an error,
// because half-written files are.
func Reload(opts LoadOptions) (*Config, error) {
	cfg, err := Load(opts)
	var errs Errors
	for _, f := range opts.files() {
		if b, err := os.ReadFile(f); err == nil && empty(b) {
			errs = append(errs, emptyError(f))
		}
	}
	if len(errs) == 0 {
		return cfg, err
	}
	var others Errors
	if errors.As(err, &others) {
		errs = append(errs, others...)
	}
	return nil, errs
}

// arm watches every directory in which a change can matter: those of the
// files, of the places that symbolic links on the way lead through, and the
// nearest one that exists where something is missing.
func (w *watcher) arm() {
	opts := w.o.Layers()
	want := map[string]os.FileInfo{}
	for _, f := range append(slices.Clone(opts.Files), opts.files()...) {
		directories(f, want)
	}
	if opts.Dir != "" {
		directories(filepath.Join(opts.Dir, "x"), want)
	}
	for _, f := range opts.Files {
		if st, err := os.Stat(f); err == nil && st.IsDir() {
			directories(filepath.Join(f, "x"), want)
		}
	}
	if w.notify != nil && maps.EqualFunc(want, w.armed, os.SameFile) {
		return
	}
	// Watches cannot be moved to a directory that took another one's place, so
	// all are made anew. What cannot be watched is polled.
	w.disarm()
	n, err := fsnotify.NewWatcher()
	if err != nil {
		return
	}
	for dir := range want {
		_ = n.Add(dir)
	}
	w.notify, w.armed = n, want
}

func (w *watcher) disarm() {
	if w.notify != nil {
		_ = w.notify.Close() // Nothing can be done about it.
		w.notify = nil
	}
}

// maxLinks bounds a chain of symbolic links, as the kernel does.
const maxLinks = 40

// directories adds the directories on the way to a path.
func directories(path string, out map[string]os.FileInfo) {
	path, err := filepath.Abs(path)
	if err != nil {
		return
	}
	for range maxLinks {
		dir := filepath.Dir(path)
		for {
			if st, err := os.Stat(dir); err == nil && st.IsDir() {
				out[dir] = st
				break
			}
			if dir == filepath.Dir(dir) {
				break
			}
			dir = filepath.Dir(dir)
		}
		// The first link on the way leads somewhere else.
		link, rest := firstLink(path)
		if link == "" {
			return
		}
		if st, err := os.Stat(filepath.Dir(link)); err == nil {
			out[filepath.Dir(link)] = st
		}
		to, err := os.Readlink(link)
		if err != nil {
			return
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(link), to)
		}
		path = filepath.Join(to, rest)
	}
}

// firstLink returns the first symbolic link on an absolute path, and what of
// the path comes behind it.
func firstLink(path string) (link, rest string) {
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != filepath.Separator {
			continue
		}
		if st, err := os.Lstat(path[:i]); err == nil && st.Mode()&os.ModeSymlink != 0 {
			return path[:i], path[i:]
		}
	}
	return "", ""
}
