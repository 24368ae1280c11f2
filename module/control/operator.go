// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/weirgate/weir/module/config"
)

// Operator is a Provider that can be looked into and steered. All methods may
// be called at any time by any goroutine. An *AnswerError becomes the answer
// with its code, any other error a 500.
type Operator interface {
	Provider

	// Reload reads the configuration's files again. A configuration that is
	// refused is a result, not an error.
	Reload(ctx context.Context) (*ReloadResult, error)
	// Plan says what a reload with this configuration would do; the text is
	// what config.Config.Dump writes.
	Plan(ctx context.Context, dump []byte) (*PlanResult, error)

	// Flows calls emit for every client connection that fits, until it returns
	// an error. The Flow is valid during the call.
	Flows(ctx context.Context, want FlowFilter, emit func(*Flow) error) error
	Pools(ctx context.Context) ([]Pool, error)
	// Kill resets a client's connections to a VIP, to all VIPs if that is not
	// valid, and returns how many there were.
	Kill(ctx context.Context, client, vip netip.AddrPort) (int, error)

	ChangeServer(ctx context.Context, farm, server string, c ServerChange) (*Override, error)
	AddServer(ctx context.Context, farm string, s ServerSpec) (*Override, error)
	RemoveServer(ctx context.Context, farm, server string, persist bool) (*Override, error)
	Overrides(ctx context.Context) ([]Override, error)
	// DropOverrides gives a server back to the files.
	DropOverrides(ctx context.Context, farm, server string) (int, error)

	Events() *Events
	// Trace calls emit for every step of the engine that concerns a watched
	// client, until ctx ends or emit returns an error.
	Trace(ctx context.Context, want TraceFilter, emit func(*TraceRecord) error) error
	// Rules is the installed ruleset in nft's syntax.
	Rules(ctx context.Context) (string, error)
}

// ReloadResult says what a reload did.
type ReloadResult struct {
	Outcome    string          `json:"outcome"`    // applied, unchanged or refused
	Generation uint64          `json:"generation"` // in use now
	Changes    []config.Change `json:"changes"`    // what was found; those of class restart were not applied
	Problems   []Problem       `json:"problems,omitempty"`
	Notes      []string        `json:"notes,omitempty"` // what else happened, in sentences
}

// The outcomes of a reload.
const (
	Applied   = "applied"
	Unchanged = "unchanged"
	Refused   = "refused"
)

// Problem is one reason why a configuration is refused.
type Problem struct {
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	Key  string `json:"key,omitempty"`
	Text string `json:"text"` // the whole message, file, line and key included
}

// PlanResult says what a reload would do.
type PlanResult struct {
	Changes   []config.Change `json:"changes"`
	Overrides []Override      `json:"overrides,omitempty"` // in force, and kept
}

// ServerChange is a change of one server at run time. What is nil stays.
type ServerChange struct {
	State   *string `json:"state,omitempty"`  // ready, drain or maint
	Weight  *int    `json:"weight,omitempty"` // 1 to 256
	Persist bool    `json:"persist,omitempty"`
}

// ServerSpec is a server that is added at run time.
type ServerSpec struct {
	Name    string         `json:"name"`
	Address netip.AddrPort `json:"address"`
	Weight  int            `json:"weight,omitempty"`
	Backup  bool           `json:"backup,omitempty"`
	Persist bool           `json:"persist,omitempty"`
}

// Override is what was changed at run time and stands in place of the files'
// value, until that changes.
type Override struct {
	Farm    string    `json:"farm"`
	Server  string    `json:"server"`
	Added   bool      `json:"added,omitempty"`   // the files do not have the server
	Removed bool      `json:"removed,omitempty"` // the files have it
	State   string    `json:"state,omitempty"`   // empty: ready
	Weight  int       `json:"weight,omitempty"`  // 0: as in the files
	Address string    `json:"address,omitempty"` // of an added server
	Backup  bool      `json:"backup,omitempty"`  // of an added server
	Since   time.Time `json:"since"`
	Persist bool      `json:"persist,omitempty"` // kept in the runtime directory over a restart

	// What the files said when the change was made.
	FileWeight  int    `json:"file_weight,omitempty"`
	FileAddress string `json:"file_address,omitempty"`
}

// FlowFilter chooses flows. Zero fields choose all.
type FlowFilter struct {
	Client netip.Prefix // address or network of the client
	Port   uint16       // of the client
	VIP    netip.AddrPort
	Farm   string
	Server string
	State  string
	Limit  int // of flows; 0: none
}

// Flow is one client connection.
type Flow struct {
	Client      string `json:"client"`
	VIP         string `json:"vip"`
	Farm        string `json:"farm"`
	State       string `json:"state"`            // head, binding, waiting, spliced, answering or closing
	Server      string `json:"server,omitempty"` // name, while one is bound
	Remote      string `json:"remote,omitempty"` // its address
	SNIP        string `json:"snip,omitempty"`   // our end of the server connection
	ServerState string `json:"server_state,omitempty"`
	Method      string `json:"method,omitempty"` // of the present or last request
	AgeMS       int64  `json:"age_ms"`           // of the request, or since when the connection is idle
	IdleMS      int64  `json:"idle_ms"`          // since the client's last packet
	Held        int    `json:"held"`             // bytes held of the client
	Added       int    `json:"added"`            // bytes inserted into the request (the patent's Bytes Added)
	Attempts    int    `json:"attempts"`
	Shard       int    `json:"shard"`
}

// AppendJSON appends the flow as one line of JSON, without a line feed. It is
// json.Marshal for a hundred thousand of them: all strings are addresses and
// names, which need no escapes.
func (f *Flow) AppendJSON(b []byte) []byte {
	text := func(key, v string) {
		b = append(b, ',', '"')
		b = append(append(b, key...), '"', ':', '"')
		b = append(append(b, v...), '"')
	}
	number := func(key string, v int64) {
		b = append(b, ',', '"')
		b = append(append(b, key...), '"', ':')
		b = strconv.AppendInt(b, v, 10)
	}
	b = append(append(b, `{"client":"`...), f.Client...)
	b = append(b, '"')
	text("vip", f.VIP)
	text("farm", f.Farm)
	text("state", f.State)
	for _, o := range [...][2]string{{"server", f.Server}, {"remote", f.Remote}, {"snip", f.SNIP}, {"server_state", f.ServerState}, {"method", f.Method}} {
		if o[1] != "" {
			text(o[0], o[1])
		}
	}
	number("age_ms", f.AgeMS)
	number("idle_ms", f.IdleMS)
	number("held", int64(f.Held))
	number("added", int64(f.Added))
	number("attempts", int64(f.Attempts))
	number("shard", int64(f.Shard))
	return append(b, '}')
}

// ReadJSON reads what AppendJSON writes. For anything else in JSON it is
// json.Unmarshal; the difference is a factor of ten.
func (f *Flow) ReadJSON(b []byte) error {
	*f = Flow{}
	if f.read(b) {
		return nil
	}
	*f = Flow{}
	return json.Unmarshal(b, f)
}

// read reads an object of strings without escapes and whole numbers.
func (f *Flow) read(b []byte) bool {
	if len(b) < 2 || b[0] != '{' || b[len(b)-1] != '}' {
		return false
	}
	b = b[1 : len(b)-1]
	for len(b) > 0 {
		if b[0] != '"' {
			return false
		}
		n := bytes.IndexByte(b[1:], '"') + 1
		if n < 1 || n+2 >= len(b) || b[n+1] != ':' {
			return false
		}
		key := b[1:n]
		b = b[n+2:]
		if b[0] == '"' {
			n = bytes.IndexByte(b[1:], '"') + 1
			if n < 1 || bytes.IndexByte(b[:n], '\\') >= 0 || !f.setText(key, string(b[1:n])) {
				return false
			}
			b = b[n+1:]
		} else {
			n = bytes.IndexByte(b, ',')
			if n < 0 {
				n = len(b)
			}
			v, err := strconv.ParseInt(string(b[:n]), 10, 64)
			if err != nil || !f.setNumber(key, v) {
				return false
			}
			b = b[n:]
		}
		if len(b) > 0 {
			if b[0] != ',' {
				return false
			}
			b = b[1:]
		}
	}
	return true
}

func (f *Flow) setText(key []byte, v string) bool {
	switch string(key) {
	case "client":
		f.Client = v
	case "vip":
		f.VIP = v
	case "farm":
		f.Farm = v
	case "state":
		f.State = v
	case "server":
		f.Server = v
	case "remote":
		f.Remote = v
	case "snip":
		f.SNIP = v
	case "server_state":
		f.ServerState = v
	case "method":
		f.Method = v
	default:
		return false
	}
	return true
}

func (f *Flow) setNumber(key []byte, v int64) bool {
	switch string(key) {
	case "age_ms":
		f.AgeMS = v
	case "idle_ms":
		f.IdleMS = v
	case "held":
		f.Held = int(v)
	case "added":
		f.Added = int(v)
	case "attempts":
		f.Attempts = int(v)
	case "shard":
		f.Shard = int(v)
	default:
		return false
	}
	return true
}

// Pool is the pool of one server: its connections now, by state.
type Pool struct {
	Farm           string            `json:"farm"`
	Server         string            `json:"server"`
	Address        string            `json:"address"`
	State          string            `json:"state"`
	Connecting     int               `json:"connecting"`
	Idle           int               `json:"idle"`
	Active         int               `json:"active"`
	Draining       int               `json:"draining"` // the client is gone, the response still runs
	Closing        int               `json:"closing"`
	Waiting        int               `json:"waiting"` // requests of the farm that wait
	MaxIdle        int               `json:"max_idle"`
	MaxConnections int               `json:"max_connections"`
	OldestIdleMS   int64             `json:"oldest_idle_ms"`
	OldestMS       int64             `json:"oldest_ms"`
	Opened         uint64            `json:"opened"`
	Reused         uint64            `json:"reused"`
	Closed         map[string]uint64 `json:"closed"`
}

// TraceFilter chooses clients to be watched.
type TraceFilter struct {
	Client netip.Prefix
	Snap   int // bytes kept of each packet; 0: all
}

// TraceRecord is one step of the engine that concerned a watched client: the
// packet that came and what left for it.
type TraceRecord struct {
	Time    time.Time `json:"time"`
	Shard   int       `json:"shard"` // -1: the thread that answers SYNs
	In      Bytes     `json:"in,omitempty"`
	Out     []Bytes   `json:"out,omitempty"`
	Reasons []string  `json:"reasons,omitempty"`
	Farm    string    `json:"farm,omitempty"`
	Server  string    `json:"server,omitempty"` // bound after the step
	Lost    uint64    `json:"lost,omitempty"`   // steps before this one that the reader was too slow for
	// SNIPs and SNIPPorts, first and last, come with the first record, which
	// has nothing else: by them a reader tells the two legs apart.
	SNIPs     []netip.Addr `json:"snips,omitempty"`
	SNIPPorts []uint16     `json:"snip_ports,omitempty"`
}

// Bytes is binary data, in base64.
type Bytes []byte

// MarshalText writes base64.
func (b Bytes) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, b), nil
}

// UnmarshalText reads base64.
func (b *Bytes) UnmarshalText(t []byte) (err error) {
	*b, err = base64.StdEncoding.AppendDecode(nil, t)
	return err
}

// NotFound is the error for something that is not there.
func NotFound(msg string) error { return &AnswerError{http.StatusNotFound, msg} }

// Conflict is the error for what cannot be done in the present state.
func Conflict(msg string) error { return &AnswerError{http.StatusConflict, msg} }

// Invalid is the error for an impossible wish.
func Invalid(msg string) error { return &AnswerError{http.StatusBadRequest, msg} }
