// SPDX-License-Identifier: Apache-2.0

// Package config holds the typed configuration of the module: its schema, the
// layers it is read from, and every check that can be made without touching
// the host. A Config that Load returned is complete (all defaults filled in)
// and free of contradictions, so that its users need not check again.
//
// The package must not look at the host (interfaces, kernel, plugins'
// executables), must not keep global state, and must not import any other
// package of the module. Looking at the host is the doctor's business,
// checking a policy's own configuration is the policy's.
//
// The struct tags are the single source of the schema: `koanf` is the name in
// the file, `default` the default value as one would write it, `doc` the
// sentence of the reference, and `enum`, `min`, `max` and `need` the checks
// that concern one value alone. docs/config.md is generated from them.
package config

import (
	"net/netip"
	"path/filepath"
	"runtime"
)

// Config is the whole configuration. It is immutable once Load has returned
// it: a reload makes a new one.
type Config struct {
	RuntimeDir  string   `koanf:"runtime_dir" doc:"Directory of the files that live as long as the instance: records, lock, plugin sockets, journal of changed sysctls. The default is the directory of admin.socket. Restart."`
	StopTimeout Duration `koanf:"stop_timeout" default:"10s" doc:"How long responses that are running at a stop may take before both sides are reset. 0 resets them at once."`
	Source      Source   `koanf:"source" doc:"The router's own side toward the servers. Restart."`
	Farms       []Farm   `koanf:"farms" doc:"Servers behind one or more VIPs. Files append to this list; names are unique over all files."`
	Plugins     []Plugin `koanf:"plugins" doc:"Policy plugins. Files append to this list; names are unique over all files. The built-in plugins path, load, state and bandwidth need an entry only to change a default."`
	Queue       Queue    `koanf:"queue" doc:"Kernel queues that carry the packets. Restart."`
	Firewall    Firewall `koanf:"firewall" doc:"The nftables table of this instance."`
	Log         Log      `koanf:"log" doc:"Program log and access log."`
	Admin       Admin    `koanf:"admin" doc:"Control socket and metrics. Restart."`

	// Files are the files that were read, in the order of their layers.
	Files []string `koanf:"-"`

	at   map[string]position
	sums map[string]checksum // of Files, as they were read
}

// Source is the router's own side toward the servers.
type Source struct {
	Addresses []netip.Addr `koanf:"addresses" doc:"SNIPs: local addresses of this router from which server connections are made. A farm is served from the SNIPs of its family."`
	Ports     PortRange    `koanf:"ports" default:"10240-32767" doc:"Port range of the SNIPs, inside 1024-65535, at least 128 ports and at least 64 for each shard. It is taken away from the router's own sockets."`
	Shared    bool         `koanf:"shared" default:"false" doc:"Set it where a masquerade or SNAT rule can use a SNIP too: a server's segment to a port that the engine does not hold is then let through."`
}

// KernelSYNs says whether SYNs are to be answered in the kernel if that can.
// Where a table of ours may be taken away by others, they are not.
func (c *Config) KernelSYNs() bool {
	return c.Queue.SYN == "auto" && c.Queue.Backend == "batched" && c.Firewall.Owned != "never"
}

// Farm is a set of servers behind one or more VIPs. All of them have one
// address family: nothing translates between families.
type Farm struct {
	Name           string           `koanf:"name" need:"name" doc:"Unique name; a letter or digit, then letters, digits, dots, underscores and hyphens, at most 63."`
	Listen         []netip.AddrPort `koanf:"listen" need:"list" doc:"VIP or list of VIPs. An address of this router, or one that is routed through it."`
	Protocol       string           `koanf:"protocol" default:"http" enum:"http" doc:"Protocol of the farm."`
	Servers        []Server         `koanf:"servers" need:"list" doc:"The farm's servers."`
	Policies       []PolicyUse      `koanf:"policies" doc:"Policies in the order in which they choose: plugin names, or mappings with the keys below. A farm without policies needs no plugin process."`
	Pool           Pool             `koanf:"pool" doc:"Pool of server connections. Limits are per server over all shards, 0 is no limit."`
	Timeouts       Timeouts         `koanf:"timeouts" doc:"Time limits of one exchange."`
	Limits         Limits           `koanf:"limits" doc:"Limits of clients: how many connections they may have, and what they may send."`
	Forwarded      string           `koanf:"forwarded" default:"none" enum:"none|x-forwarded-for|forwarded" doc:"Field that tells the servers the client's address. A field of that name that the client sent is neutralised."`
	ForwardedTrust []Prefix         `koanf:"forwarded_trust" doc:"Clients, such as proxies in front, whose own forwarding fields are kept; the field with their address follows behind."`
	RouteSafety    string           `koanf:"route_safety" enum:"|reject|pass" doc:"What to do with a path that a server may read as another one than the routes: one with dot segments, //, a backslash, or %2e, %2f, %5c, %00. Without it: reject (400) where a policy of the farm sends routes."`
}

// Limits holds what clients may send. All but the limits of connections are above zero.
type Limits struct {
	Head           ByteSize `koanf:"head" default:"64KiB" need:"positive" doc:"A request head, from the request line to the empty line; at most 1MiB. A larger one gets 431."`
	Fields         int      `koanf:"fields" default:"100" min:"1" max:"1000" doc:"Field lines of a request head. More get 431."`
	Target         ByteSize `koanf:"target" default:"8000" need:"positive" doc:"The request target; at most 65535. A longer one gets 414."`
	ChunkExtension ByteSize `koanf:"chunk_extension" default:"4KiB" need:"positive" doc:"Extensions of one chunk line; at most 65535."`
	Trailers       ByteSize `koanf:"trailers" default:"8KiB" need:"positive" doc:"The trailer section of a chunked request; at most 1MiB."`
	BodyRate       Rate     `koanf:"body_rate" default:"4Kbit" doc:"Least pace of a request's body, measured over timeouts.body while the server takes more. A slower one gets 408. 0 is no limit."`
	Connections    int      `koanf:"connections" default:"0" min:"0" max:"16777215" doc:"Client connections of the farm at once, those that have asked for something. A further one is reset; established ones are untouched. 0 is no limit but the room of the tables."`
	PerClient      int      `koanf:"per_client" default:"8192" min:"0" max:"16777215" doc:"The same for one client, which is an IPv4 address or a /64 of IPv6. Many people may share one address. 0 is no limit."`
	Held           ByteSize `koanf:"held" default:"256MiB" doc:"Bytes of requests that are held for all clients of the farm together, until a server takes them; the first 4KiB of each client do not count. What comes beyond waits in the client, as if it were lost. 0 is no limit."`
}

// Server is one server of a farm.
type Server struct {
	Name    string         `koanf:"name" need:"name" doc:"Name, unique in the farm."`
	Address netip.AddrPort `koanf:"address" need:"value" doc:"Literal address and port."`
	Weight  int            `koanf:"weight" default:"1" min:"1" max:"256" doc:"Share of the requests in proportion to the other servers' weights."`
	Backup  bool           `koanf:"backup" default:"false" doc:"Serve only when no other server of the farm can."`
}

// PolicyUse is one entry of a farm's policies.
type PolicyUse struct {
	Use      string         `koanf:"use" need:"value" doc:"Name of the plugin."`
	Config   map[string]any `koanf:"config" doc:"The policy's own configuration for this farm, laid over the plugin's."`
	OnEmpty  string         `koanf:"on_empty" enum:"|reject|ignore|wait" doc:"What to do when the policy leaves no server. Without it: routes reject with 404, eligibility with 503, budgets are ignored."`
	Shadow   bool           `koanf:"shadow" default:"false" doc:"The policy decides nothing: it is only compared with what was decided, see the agreement in status and metrics. It is never asked about requests."`
	Fallback string         `koanf:"fallback" default:"ignore" enum:"ignore|reject" doc:"What to do with a request about which the plugin was asked and has not answered in time: go on without it, or answer 503."`
}

// Pool holds the limits of the server connections.
type Pool struct {
	MaxIdle        int      `koanf:"max_idle" default:"64" min:"0" doc:"Idle connections kept per server. The default is never above max_connections."`
	MaxConnections int      `koanf:"max_connections" default:"512" min:"0" doc:"Connections per server."`
	MinIdle        int      `koanf:"min_idle" default:"0" min:"0" doc:"Idle connections kept open per server in advance."`
	MaxConnecting  int      `koanf:"max_connecting" default:"16" min:"0" doc:"Connections per server that may be in their handshake at once; further requests wait for one that gets free."`
	IdleTimeout    Duration `koanf:"idle_timeout" default:"30s" doc:"How long a connection may stay idle."`
	MaxRequests    int      `koanf:"max_requests" default:"0" min:"0" doc:"Requests after which a connection is retired."`
	MaxAge         Duration `koanf:"max_age" default:"0s" doc:"Age at which a connection is retired."`
	MaxWaiting     int      `koanf:"max_waiting" default:"1024" min:"0" doc:"Requests of the farm that may wait for a connection."`
	WaitTimeout    Duration `koanf:"wait_timeout" default:"5s" doc:"How long a request may wait before it is answered with 503."`
	DrainLimit     ByteSize `koanf:"drain_limit" default:"1MiB" doc:"Bytes of a response that are drained for a client that went away, to keep the server connection."`
	DrainTimeout   Duration `koanf:"drain_timeout" default:"10s" doc:"Time for the same."`
}

// Timeouts holds the time limits of one exchange. All are above zero.
type Timeouts struct {
	Connect  Duration `koanf:"connect" default:"5s" need:"positive" doc:"Establishment of a server connection."`
	Head     Duration `koanf:"head" default:"15s" need:"positive" doc:"From the first byte of a request to the end of its head."`
	Body     Duration `koanf:"body" default:"20s" need:"positive" doc:"Over which the pace of a request's body is measured, see limits.body_rate."`
	Idle     Duration `koanf:"idle" default:"60s" need:"positive" doc:"A client connection between requests."`
	Response Duration `koanf:"response" default:"60s" need:"positive" doc:"Silence of the server while a response is due; not its total time."`
	Tunnel   Duration `koanf:"tunnel" default:"1h" need:"positive" doc:"Silence of both sides of an upgraded connection (WebSocket)."`
	Drain    Duration `koanf:"drain" default:"60s" need:"positive" doc:"How long exchanges with a server or VIP that was removed from the configuration may go on before they are cut."`
}

// Plugin is one policy plugin.
type Plugin struct {
	Name         string         `koanf:"name" need:"name" doc:"Name under which farms use it."`
	Config       map[string]any `koanf:"config" doc:"The policy's own configuration; a farm's entry overlays it."`
	Command      []string       `koanf:"command" doc:"Program and arguments; default: the plugin's name. A program without a slash is looked up in plugins/ beside the weir executable, then in /usr/lib/weir/plugins."`
	User         string         `koanf:"user" doc:"User that runs it; default: an unprivileged one."`
	Checksum     string         `koanf:"checksum" need:"checksum" doc:"SHA-256 of the program in 64 hexadecimal digits; a program with another one is not started."`
	StartTimeout Duration       `koanf:"start_timeout" default:"5s" need:"positive" doc:"How long a farm waits for the policy's first snapshot before it takes connections without it."`
	Expiry       Duration       `koanf:"expiry" default:"30s" doc:"Age at which a silent plugin's eligibility, scores and budgets are no longer used. Routes stay."`

	Restart Restarts `koanf:"restart" doc:"How a program that ended is started again."`
	Ask     Ask      `koanf:"ask" doc:"For plugins that want to be asked about single requests."`

	// Implied marks an entry that no file has: a farm uses a built-in plugin
	// that is not listed.
	Implied bool `koanf:"-"`
}

// Restarts says how a plugin that ended is started again.
type Restarts struct {
	Min   Duration `koanf:"min" default:"100ms" need:"positive" doc:"Pause before the first restart; it doubles with each further one, and begins anew after 30s of life."`
	Max   Duration `koanf:"max" default:"5s" need:"positive" doc:"Longest pause."`
	Limit int      `koanf:"limit" default:"10" min:"0" doc:"Starts within a minute; after more there is one try per 30s. 0 is no limit."`
}

// Ask bounds the questions to a plugin.
type Ask struct {
	Deadline    Duration `koanf:"deadline" default:"5ms" need:"positive" doc:"How long a request waits for an answer before the farm's fallback holds."`
	Concurrency int      `koanf:"concurrency" default:"64" min:"1" max:"4096" doc:"Questions that may be open at once; a further one gets the fallback."`
}

// Queue describes the kernel queues: one for SYNs, one for control, one per
// shard, numbered from First on.
type Queue struct {
	First   int    `koanf:"first" default:"22272" min:"0" max:"65532" doc:"Number of the first queue; an instance uses first to first + 1 + shards."`
	Shards  Shards `koanf:"shards" default:"auto" doc:"Number of shards, 1 to 64; auto is half of the processors."`
	GSO     bool   `koanf:"gso" default:"true" doc:"Take packets as large as the kernel has them, instead of cut to the MTU."`
	Backend string `koanf:"backend" default:"batched" enum:"batched|plain" doc:"How queues are read: batched moves many packets per system call, plain is the reference to compare with."`
	SYN     string `koanf:"syn" default:"auto" enum:"auto|queue" doc:"Who answers SYNs to a VIP on the router that the existing rules let through: auto, the kernel, by a BPF program at the output of lo, where it can run that (Linux 6.10 with tcx, BPF and nft_dup) and backend is batched; elsewhere, and with queue, Weir's own thread from the SYN queue."`
	Length  int    `koanf:"length" default:"16384" min:"16" max:"1048576" doc:"Packets that a shard's queue may hold."`
	Clients int    `koanf:"clients" default:"262144" min:"64" max:"16777215" doc:"Client connections that a shard may hold, those that have asked for something; a further one is reset. Each takes about 400 bytes, from when it is there. Connections do not survive a restart that changes it."`
	Servers int    `koanf:"servers" default:"16384" min:"64" max:"1048575" doc:"The same for server connections."`
}

// Firewall describes the nftables table.
type Firewall struct {
	Table   string `koanf:"table" default:"weir" need:"table" doc:"Name of the table in family inet. Several instances in one namespace need different ones. Restart."`
	Mark    Mark   `koanf:"mark" default:"0x57000000/0xff000000" doc:"Mark of translated and emitted packets, VALUE/MASK. Only the bits of the mask are touched. Accept it in chains that would drop these packets. Restart."`
	Inspect string `koanf:"inspect" default:"syn" enum:"syn|all" doc:"Which packets to a VIP the existing rules see with the client's address: the SYN, or all. Restart."`
	OnStop  string `koanf:"on_stop" default:"close" enum:"close|direct" doc:"What happens to new connections after a stop: close leaves them to whatever else the router does, direct sends them to one server by a plain DNAT."`
	Owned   string `koanf:"owned" default:"auto" enum:"auto|never" doc:"Whether the table belongs to this process: auto, where the kernel can (Linux 6.9), so that nobody else can change or flush it; never leaves it open to others, and puts it back when they remove it. Restart."`
}

// Log describes the program log and the access log.
type Log struct {
	Level  string `koanf:"level" default:"info" enum:"debug|info|warn|error" doc:"Least severity that is written."`
	Format string `koanf:"format" default:"text" enum:"text|json" doc:"Format of the program log."`
	Access Access `koanf:"access" doc:"One line per request."`
}

// Access describes the access log.
type Access struct {
	Path   string `koanf:"path" doc:"File or unix socket; empty: no access log."`
	Format string `koanf:"format" default:"common" enum:"common|json" doc:"Format of a line."`
	Sample int    `koanf:"sample" default:"1" min:"1" doc:"Write one request of this many."`
}

// Admin describes where the instance is controlled and observed.
type Admin struct {
	Socket  string         `koanf:"socket" default:"/run/weir/admin.sock" need:"socket" doc:"Unix socket of the control API, an absolute path."`
	Metrics netip.AddrPort `koanf:"metrics" default:"127.0.0.1:9464" doc:"Literal address and port of the metrics; empty: none. They are not protected: name an address other than loopback only if its network may read them."`
}

// builtin are the names of the plugins that come with the program. They need
// no entry in plugins.
var builtin = [...]string{"path", "load", "state", "bandwidth"}

// Builtin returns the names of the plugins that come with the program.
func Builtin() []string { return append([]string(nil), builtin[:]...) }

// maxShards bounds the number of shards.
const maxShards = 64

// minPortsPerShard is the least slice of the SNIP port range that a shard can
// work with.
const minPortsPerShard = 64

// ShardCount returns the number of shards on a machine with that many
// processors (0 means this machine's): the configured one, or for auto
// max(1, processors/2), bounded by what the port range and the queue numbers
// allow.
func (c *Config) ShardCount(processors int) int {
	if c.Queue.Shards != ShardsAuto {
		return int(c.Queue.Shards)
	}
	if processors <= 0 {
		processors = runtime.NumCPU()
	}
	return max(1, min(processors/2, maxShards, c.Source.Ports.Size()/minPortsPerShard, 65535-2-c.Queue.First))
}

// Farm returns the farm of that name, nil if there is none.
func (c *Config) Farm(name string) *Farm {
	for i := range c.Farms {
		if c.Farms[i].Name == name {
			return &c.Farms[i]
		}
	}
	return nil
}

// Plugin returns the plugin of that name, nil if there is none.
func (c *Config) Plugin(name string) *Plugin {
	for i := range c.Plugins {
		if c.Plugins[i].Name == name {
			return &c.Plugins[i]
		}
	}
	return nil
}

// UsedPlugins returns the plugins that at least one farm uses, in the order of
// the list. Others are not started.
func (c *Config) UsedPlugins() []*Plugin {
	used := map[string]bool{}
	for i := range c.Farms {
		for _, p := range c.Farms[i].Policies {
			used[p.Use] = true
		}
	}
	var out []*Plugin
	for i := range c.Plugins {
		if used[c.Plugins[i].Name] {
			out = append(out, &c.Plugins[i])
		}
	}
	return out
}

// PolicyConfig returns the configuration of one policy of one farm: the
// plugin's with the farm's laid over it. Mappings are merged, everything else
// is replaced. The caller owns the result.
func (c *Config) PolicyConfig(f *Farm, use string) map[string]any {
	out := map[string]any{}
	if p := c.Plugin(use); p != nil {
		overlay(out, p.Config)
	}
	for i := range f.Policies {
		if f.Policies[i].Use == use {
			overlay(out, f.Policies[i].Config)
		}
	}
	return out
}

// overlay copies src deeply over dst.
func overlay(dst, src map[string]any) {
	for k, v := range src {
		if m, ok := v.(map[string]any); ok {
			d, ok := dst[k].(map[string]any)
			if !ok {
				d = map[string]any{}
				dst[k] = d
			}
			overlay(d, m)
			continue
		}
		dst[k] = deepCopy(v)
	}
}

func deepCopy(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for k, e := range v {
			m[k] = deepCopy(e)
		}
		return m
	case []any:
		l := make([]any, len(v))
		for i, e := range v {
			l[i] = deepCopy(e)
		}
		return l
	}
	return v
}

// complete fills in what depends on other values.
func (c *Config) complete() {
	if c.RuntimeDir == "" {
		c.RuntimeDir = filepath.Dir(c.Admin.Socket)
	}
	for i := range c.Plugins {
		if p := &c.Plugins[i]; len(p.Command) == 0 && p.Name != "" {
			p.Command = []string{p.Name}
		}
	}
}
