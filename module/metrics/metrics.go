// SPDX-License-Identifier: Apache-2.0

// Package metrics shows what an instance counts to Prometheus. Nothing is kept
// here: a scrape reads the counters that the shards, the queues, the emitters,
// the ruleset and the plugins' supervisors keep anyway, so that a scrape that
// does not come costs nothing and one that comes disturbs no packet.
//
// The labels are those of family.go: names from the configuration, and words
// from fixed lists. The package must not use an address of a client, a path or
// anything else of which there may be any number, and it must not know where
// the counters come from: a Source hands them over.
package metrics

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/weirgate/weir/module/divert"
	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/nft"
	"github.com/weirgate/weir/plugins/host"
)

// Source hands over what is to be shown. Every function may be called from
// several goroutines at once; a nil one leaves its metrics out.
type Source struct {
	Version string
	Started time.Time

	State     func() State
	Farms     func() *farm.DB
	Handshake *engine.Handshake
	Queues    []Queue
	// Usage is what the engines hold, in the order of their queues. It is asked
	// with a time limit, because the answer comes from the packet threads.
	Usage func(context.Context) ([]engine.Usage, error)
	// MaxClients and MaxServers are the sizes of one engine's tables, records.
	MaxClients, MaxServers int

	// Collected is called when all counters of a scrape are read, before anybody
	// is told of them.
	Collected func()

	Firewall func(context.Context) (map[string]nft.Counter, error)
	Rules    func() Rules
	Plugins  func() []host.Status
	Access   func() AccessLog
}

// Queue is one kernel queue with the thread that serves it.
type Queue struct {
	Name   string // syn, control, or the number of the shard
	Engine *engine.Counters
	Stats  func() divert.Stats
	Emit   func() divert.EmitStats
	Spent  *farm.Histogram // per batch, from Receive to Send
}

// Rules is what has become of the ruleset since the start.
type Rules struct {
	Restored     uint64 // times that it was put back
	GuardDropped uint64 // packets that the guard held back meanwhile
	Foreign      int    // findings about tables of others, now
}

// State is how the instance is.
type State struct {
	Condition  string // as in package control
	Generation uint64 // of the database of farms
	Refused    bool   // the configuration's files are not what is in force
	Waiting    int    // changes that wait for a restart
}

// AccessLog counts the records of the access log since the start.
type AccessLog struct {
	Written uint64 // lines
	Dropped uint64 // records that found no room, or could not be written
}

// scrapeTime bounds what a scrape waits for packet threads and the kernel.
const scrapeTime = 2 * time.Second

// Handler serves the metrics of a source, and of the Go process, under every
// path.
func Handler(s Source) http.Handler {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(
		collector{s},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		// One counter that cannot be read must not hide the others.
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4,
	})
}

// Serve answers scrapes at /metrics until ctx ends, and closes the listener.
func Serve(ctx context.Context, l net.Listener, s Source) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", Handler(s))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write([]byte("<!doctype html><title>Weir</title><a href=\"/metrics\">metrics</a>\n"))
	})
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	err := srv.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
