// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"io"
	"log/slog"
	"sync/atomic"

	"github.com/weirgate/weir/module/config"
)

// Logger returns the program log that the configuration asks for.
func Logger(c config.Log, w io.Writer) *slog.Logger {
	l, _ := SwitchedLogger(c, w)
	return l
}

// SwitchedLogger is Logger with a function that takes over another
// configuration, for a reload.
func SwitchedLogger(c config.Log, w io.Writer) (*slog.Logger, func(config.Log)) {
	s := new(logSwitch)
	s.set(c)
	opts := &slog.HandlerOptions{Level: &s.level}
	return slog.New(&switchedHandler{s, slog.NewTextHandler(w, opts), slog.NewJSONHandler(w, opts)}), s.set
}

// logSwitch is what may change about a log.
type logSwitch struct {
	level slog.LevelVar
	json  atomic.Bool
}

func (s *logSwitch) set(c config.Log) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // Load has checked it; the zero Config has none.
	}
	s.level.Set(level)
	s.json.Store(c.Format == "json")
}

// switchedHandler writes in one of two formats, as the switch says.
type switchedHandler struct {
	s          *logSwitch
	text, json slog.Handler
}

// Enabled implements slog.Handler.
func (h *switchedHandler) Enabled(_ context.Context, l slog.Level) bool {
	return l >= h.s.level.Level()
}

// Handle implements slog.Handler.
func (h *switchedHandler) Handle(ctx context.Context, r slog.Record) error {
	if h.s.json.Load() {
		return h.json.Handle(ctx, r)
	}
	return h.text.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *switchedHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return &switchedHandler{h.s, h.text.WithAttrs(a), h.json.WithAttrs(a)}
}

// WithGroup implements slog.Handler.
func (h *switchedHandler) WithGroup(name string) slog.Handler {
	return &switchedHandler{h.s, h.text.WithGroup(name), h.json.WithGroup(name)}
}
