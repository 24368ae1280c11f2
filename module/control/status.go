// SPDX-License-Identifier: Apache-2.0

// Package control is how an instance is watched and, later, steered: JSON over
// HTTP on a unix socket. It holds the types of the answers, the server and the
// client.
//
// The package must not know where the numbers come from (a Provider hands them
// over) and must not run on a packet's path. Field names and meanings of
// version v1 only grow.
package control

import (
	"time"

	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/policies/snapshot"
)

// Condition says how an instance is.
type Condition string

// The conditions of an instance.
const (
	Starting Condition = "starting" // not all farms take connections yet
	Ready    Condition = "ready"
	Degraded Condition = "degraded" // it works, but not all of it; see Status.Reasons
	Stopping Condition = "stopping" // no new connections; running responses end
)

// Status is the answer of GET /v1/status.
type Status struct {
	Version    string    `json:"version"`
	PID        int       `json:"pid"`
	Started    time.Time `json:"started"`
	Generation uint64    `json:"generation"` // of the configuration in use, from 1
	Condition  Condition `json:"condition"`
	Reasons    []string  `json:"reasons,omitempty"` // why it is degraded
	Shards     int       `json:"shards"`
	Farms      []Farm    `json:"farms"`
	Plugins    []Plugin  `json:"plugins"`
}

// Farm is one farm. The counts are since the farm came into being.
type Farm struct {
	Name              string   `json:"name"`
	Listen            []string `json:"listen"`
	Removed           bool     `json:"removed,omitempty"` // gone from the configuration, connections still run
	ClientConnections uint64   `json:"client_connections"`
	Requests          uint64   `json:"requests"`
	OwnAnswers        uint64   `json:"own_answers"`  // answered by the engine itself
	Redispatched      uint64   `json:"redispatched"` // sent to another server after a failure
	Clients           int      `json:"clients"`      // client connections that have asked for something, now
	Waiting           int      `json:"waiting"`      // requests that wait for a connection now
	Opened            uint64   `json:"opened"`       // server connections
	Reused            uint64   `json:"reused"`       // requests that found an idle server connection
	ReuseRatio        float64  `json:"reuse_ratio"`  // reused / (reused + opened), 0 without any
	BytesIn           uint64   `json:"bytes_in"`     // payload from clients to servers
	BytesOut          uint64   `json:"bytes_out"`
	Servers           []Server `json:"servers"`
}

// Server is one server of a farm.
type Server struct {
	Name     string            `json:"name"`
	Address  string            `json:"address"`
	State    string            `json:"state"`             // ready, drain, maint, down, or removed
	Avoided  bool              `json:"avoided,omitempty"` // a policy keeps requests away from it
	Weight   int               `json:"weight"`
	Backup   bool              `json:"backup"`
	Idle     int               `json:"idle"`    // connections without a request, now
	Active   int               `json:"active"`  // connections with a request, now
	Waiting  int               `json:"waiting"` // requests that wait for this server, now
	Open     int               `json:"open"`    // connections now, those in their handshake too
	Requests uint64            `json:"requests"`
	Opened   uint64            `json:"opened"`
	Reused   uint64            `json:"reused"`
	Closed   map[string]uint64 `json:"closed"` // by kind, those that happened
	Failed   map[string]uint64 `json:"failed"` // by kind, those that happened
	BytesIn  uint64            `json:"bytes_in"`
	BytesOut uint64            `json:"bytes_out"`
}

// Plugin is one plugin process.
type Plugin struct {
	Name     string `json:"name"`
	Version  string `json:"version,omitempty"`
	State    string `json:"state"` // as the supervisor calls it
	PID      int    `json:"pid,omitempty"`
	Restarts uint64 `json:"restarts"`
	Error    string `json:"error,omitempty"` // why it last ended

	Farms []PluginFarm `json:"farms,omitempty"` // what it said, and what came of it
}

// Farms reads the counters of a generation. Removed farms and servers whose
// connections still run are in it.
func Farms(db *farm.DB) []Farm {
	out := []Farm{}
	for _, f := range db.Farms {
		c := countFarm(f)
		for _, s := range f.Servers {
			c.Servers = append(c.Servers, CountServer(s))
		}
		for _, s := range db.Draining {
			if s.Farm == f {
				c.Servers = append(c.Servers, CountServer(s))
			}
		}
		out = append(out, c)
	}
	for _, f := range db.Removed {
		c := countFarm(f)
		for _, s := range db.Draining {
			if s.Farm == f {
				c.Servers = append(c.Servers, CountServer(s))
			}
		}
		out = append(out, c)
	}
	return out
}

func countFarm(f *farm.Farm) Farm {
	c := Farm{
		Name: f.Name, Removed: f.Removed, Listen: []string{}, Servers: []Server{},
		ClientConnections: f.Stats.ClientConnections.Load(),
		Requests:          f.Stats.Requests.Load(),
		OwnAnswers:        f.Stats.OwnAnswers.Load(),
		Redispatched:      f.Stats.Redispatched.Load(),
		Clients:           int(f.Stats.Clients.Load()),
		Waiting:           int(f.Stats.Waiting.Load()),
		Opened:            f.Stats.Opened.Load(),
		Reused:            f.Stats.Reused.Load(),
		BytesIn:           f.Stats.BytesIn.Load(),
		BytesOut:          f.Stats.BytesOut.Load(),
	}
	for _, v := range f.VIPs {
		c.Listen = append(c.Listen, v.String())
	}
	if all := c.Reused + c.Opened; all > 0 {
		c.ReuseRatio = float64(c.Reused) / float64(all)
	}
	return c
}

// CountServer reads the counters of one server.
func CountServer(s *farm.Server) Server {
	c := Server{
		Name: s.Name, Address: s.Endpoint.String(), Weight: int(s.Weight), Backup: s.Backup,
		State: snapshot.State(s.Live.State.Load()).String(),
		Idle:  int(s.Live.Idle.Load()), Active: int(s.Live.Active.Load()), Waiting: int(s.Live.Waiting.Load()),
		Open:     int(s.Stats.Open.Load()),
		Requests: s.Stats.Requests.Load(), Opened: s.Stats.Opened.Load(), Reused: s.Stats.Reused.Load(),
		BytesIn: s.Stats.BytesIn.Load(), BytesOut: s.Stats.BytesOut.Load(),
		Closed: map[string]uint64{}, Failed: map[string]uint64{},
	}
	if s.Removed() {
		c.State = "removed"
	}
	c.Avoided = s.Live.AvoidUntil.Load() > time.Now().UnixNano()
	for k := range s.Stats.Closed {
		if n := s.Stats.Closed[k].Load(); n > 0 {
			c.Closed[farm.CloseKind(k).String()] = n
		}
	}
	for k := range s.Stats.Failed {
		if n := s.Stats.Failed[k].Load(); n > 0 {
			c.Failed[farm.FailKind(k).String()] = n
		}
	}
	return c
}
