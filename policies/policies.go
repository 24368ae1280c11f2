// SPDX-License-Identifier: Apache-2.0

// Package policies is what the author of a policy plugin needs: the contract
// (policypb/policy.proto) as Go types, Serve, and helpers for configuration.
//
// A plugin is a main package that calls Serve with a Plugin. For each farm that
// uses it, Weir's host makes one Policy by Plugin.New, gives it the farm and
// its configuration by Configure, and from then on calls Tick about once a
// second. What Tick returns, a Snapshot, is all that Weir needs to choose
// servers by itself: no request ever waits for a plugin.
//
//	type favour struct {
//		Server string `json:"server"`
//	}
//
//	func (f *favour) Configure(farm policies.Farm, config []byte) error {
//		if err := policies.Decode(config, f); err != nil {
//			return err
//		}
//		return farm.CheckServer("config.server", f.Server)
//	}
//
// This package is used by both ends: by the plugins and by plugins/host. It
// must not import anything of module/, and must stay usable by a plugin that
// lives in another repository.
package policies

//go:generate ./generate.sh

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/go-plugin"

	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// ProtocolVersion is the version of the contract, and only grows in kind: all
// versions of the protobuf package weir.policy.v1 have this one.
const ProtocolVersion = 1

// Handshake is what Weir and a plugin tell each other before they speak gRPC.
// The cookie protects nobody; it lets a plugin that is started by hand say so.
var Handshake = plugin.HandshakeConfig{
	ProtocolVersion:  ProtocolVersion,
	MagicCookieKey:   "WEIR_POLICY_PLUGIN",
	MagicCookieValue: "answers-for-the-weir",
}

// Environment of a plugin process, beside that of go-plugin.
const (
	// EnvParentStdin set to 1 says that standard input is a pipe which ends
	// when Weir is gone.
	EnvParentStdin = "WEIR_PARENT_STDIN"
)

// PluginKey is the name under which the policy is dispensed.
const PluginKey = "policy"

// CapabilityPush is the capability to send snapshots.
const CapabilityPush = "push"

// MaxMessage is the size of the largest message either side accepts, in bytes.
const MaxMessage = 16 << 20

// The parts of snapshots, under the names that plugins use.
type (
	Snapshot    = snapshot.Snapshot
	Routes      = snapshot.Routes
	Route       = snapshot.Route
	Target      = snapshot.Target
	Eligibility = snapshot.Eligibility
	Eligible    = snapshot.Eligible
	Scores      = snapshot.Scores
	Score       = snapshot.Score
	FieldMatch  = snapshot.FieldMatch
	Affinity    = snapshot.Affinity
	AffinityKey = snapshot.AffinityKey
	Pin         = snapshot.Pin
	Budgets     = snapshot.Budgets
	Budget      = snapshot.Budget

	Telemetry       = policypb.Telemetry
	ServerTelemetry = policypb.ServerTelemetry
	Kind            = policypb.SnapshotKind
)

// What snapshots can hold, for Plugin.Sends.
const (
	SendsRoutes      = policypb.SnapshotKind_SNAPSHOT_KIND_ROUTES
	SendsEligibility = policypb.SnapshotKind_SNAPSHOT_KIND_ELIGIBILITY
	SendsScores      = policypb.SnapshotKind_SNAPSHOT_KIND_SCORES
	SendsBudgets     = policypb.SnapshotKind_SNAPSHOT_KIND_BUDGETS
	SendsAffinity    = policypb.SnapshotKind_SNAPSHOT_KIND_AFFINITY
)

// Plugin describes a plugin to Serve.
type Plugin struct {
	Name    string // for people and logs
	Version string // for people and logs

	// New makes the policy of one farm.
	New func() Policy

	// Sends says what its snapshots may hold. With SendsRoutes a farm answers
	// 503 until the first routes are there, instead of guessing.
	Sends []Kind

	// Tick is how often it wants a Tick, 100 ms to 1 s; 0 leaves it to Weir.
	Tick time.Duration

	// Ask says what Decide wants to know of a request; nil: the plugin is not
	// to be asked. Its policies have to be Deciders.
	Ask *AskKey
}

// Policy is what a plugin does for one farm. Its methods are never called at
// the same time, except that policies of different farms run side by side.
//
// It may also have
//
//	Schema() []byte // a JSON Schema of the configuration
//	Close()         // the farm no longer uses the plugin, or the process ends
type Policy interface {
	// Configure takes the farm and the configuration, a JSON object; Decode
	// reads it strictly. It is called again when either changes. Every
	// configuration is first tried on a Policy made for that alone, so that an
	// error leaves the one at work as it was; Configure must therefore start
	// no work in the background, which is for the first Tick. An error about a
	// key is a *ConfigError; several are joined by errors.Join.
	Configure(farm Farm, config []byte) error

	// Tick takes how the farm is and returns what the policy says about it. To
	// return nil, or the same pointer again, means that nothing changed. A
	// snapshot that was returned must not be changed any more. It should
	// return well within a second. After an error Weir goes on with the last
	// snapshot.
	Tick(farm Farm, t *Telemetry) (*Snapshot, error)
}

// Farm is a group of servers behind one virtual address.
type Farm struct {
	Name    string
	Servers []Server
}

// Server is one server of a farm.
type Server struct {
	Name    string
	Address string // address:port
	Weight  uint32 // 1 to 256
	Backup  bool   // used only when no other server can be
}

// Has reports whether the farm has a server of that name.
func (f *Farm) Has(server string) bool {
	for i := range f.Servers {
		if f.Servers[i].Name == server {
			return true
		}
	}
	return false
}

// CheckServer returns a *ConfigError for the key if the farm has no server of
// that name. It names the servers that the farm has.
func (f *Farm) CheckServer(key, server string) error {
	if f.Has(server) {
		return nil
	}
	const most = 10
	var names []string
	for i := range f.Servers {
		names = append(names, f.Servers[i].Name)
	}
	if n := len(names); n > most {
		names = append(names[:most], fmt.Sprintf("and %d more", n-most))
	}
	return &ConfigError{Path: key, Message: fmt.Sprintf("server %q is not in farm %q, which has %s", server, f.Name, strings.Join(names, ", "))}
}

// ConfigError is one thing that is wrong with a configuration.
type ConfigError struct {
	Path    string // the key, as in "config.routes[1].prefix"; "" is the whole
	Message string // what is wrong, and what is expected
}

func (e *ConfigError) Error() string {
	if e.Path == "" {
		return e.Message
	}
	return e.Path + ": " + e.Message
}

// Errorf makes a *ConfigError for a key.
func Errorf(key, format string, args ...any) error {
	return &ConfigError{Path: key, Message: fmt.Sprintf(format, args...)}
}

// configErrors takes joined errors apart, for the wire.
func configErrors(err error) []*policypb.ConfigError {
	if err == nil {
		return nil
	}
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		var out []*policypb.ConfigError
		for _, e := range j.Unwrap() {
			out = append(out, configErrors(e)...)
		}
		return out
	}
	var e *ConfigError
	if errors.As(err, &e) {
		return []*policypb.ConfigError{{Path: e.Path, Message: e.Message}}
	}
	return []*policypb.ConfigError{{Message: err.Error()}}
}
