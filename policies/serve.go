// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/weirgate/weir/policies/policypb"
)

// Serve runs the plugin. A plugin's main function calls it and does nothing
// else. It returns when Weir says so; the process ends at once when Weir is
// gone. What the plugin logs by log/slog appears in Weir's log under the
// plugin's name.
func Serve(p Plugin) {
	if err := p.check(); err != nil {
		fmt.Fprintln(os.Stderr, "policies.Serve:", err)
		os.Exit(2)
	}
	// go-plugin replaces os.Stderr; the handler keeps the real one.
	slog.SetDefault(slog.New(logHandler(os.Stderr)))
	// The host may have started us by way of a descriptor, which gives the
	// process a number for a name. It is for ps only: an error does not matter.
	_ = os.WriteFile("/proc/self/comm", []byte(p.Name), 0)
	if os.Getenv(EnvParentStdin) == "1" {
		go exitWith(os.Stdin)
	}
	s := newServer(p)
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: Handshake,
		Plugins:         plugin.PluginSet{PluginKey: &grpcPlugin{server: s}},
		Logger:          hclog.New(&hclog.LoggerOptions{Level: hclog.Error, Output: os.Stderr, JSONFormat: true}),
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(MaxMessage), grpc.MaxSendMsgSize(MaxMessage))...)
		},
	})
	s.close()
}

// check says what a plugin's author forgot.
func (p *Plugin) check() error {
	if p.New == nil || p.Name == "" {
		return errors.New("Plugin.Name and Plugin.New are needed")
	}
	if p.Ask == nil {
		return nil
	}
	v := p.New()
	defer closePolicy(v)
	if _, ok := v.(Decider); !ok {
		return errors.New("Plugin.Ask needs policies with a method Decide")
	}
	_, err := AskKeyFromProto(AskKeyToProto(p.Ask))
	return err
}

// exitWith ends the process when the pipe from the host ends. Linux also sends
// a signal when the host dies, but not through every change of user.
func exitWith(pipe io.Reader) {
	_, _ = io.Copy(io.Discard, pipe)
	os.Exit(0)
}

// logHandler writes the lines that go-plugin understands.
func logHandler(w io.Writer) slog.Handler {
	return slog.NewJSONHandler(w, &slog.HandlerOptions{
		Level: slog.LevelDebug, // the host knows what is wanted
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) > 0 {
				return a
			}
			switch a.Key {
			case slog.TimeKey:
				return slog.String("@timestamp", a.Value.Time().Format("2006-01-02T15:04:05.000000Z07:00"))
			case slog.MessageKey:
				a.Key = "@message"
			case slog.LevelKey:
				a.Key = "@level"
			}
			return a
		},
	})
}

// Clients are the host's ends of a plugin's services.
type Clients struct {
	Base policypb.BaseClient
	Push policypb.PushClient
	Ask  policypb.AskClient
}

// ClientPlugins is what the host gives to go-plugin; dispensing PluginKey
// returns a *Clients.
func ClientPlugins() plugin.PluginSet {
	return plugin.PluginSet{PluginKey: &grpcPlugin{}}
}

// grpcPlugin binds the services to go-plugin.
type grpcPlugin struct {
	plugin.NetRPCUnsupportedPlugin
	server *server // nil in the host
}

func (p *grpcPlugin) GRPCServer(_ *plugin.GRPCBroker, g *grpc.Server) error {
	policypb.RegisterBaseServer(g, p.server)
	policypb.RegisterPushServer(g, p.server)
	policypb.RegisterAskServer(g, p.server)
	return nil
}

func (p *grpcPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return &Clients{Base: policypb.NewBaseClient(c), Push: policypb.NewPushClient(c), Ask: policypb.NewAskClient(c)}, nil
}

// server turns calls into method calls on the policies of the farms.
type server struct {
	policypb.UnimplementedBaseServer
	policypb.UnimplementedPushServer
	policypb.UnimplementedAskServer
	plugin Plugin

	mu    sync.Mutex // guards farms
	farms map[string]*instance
}

// instance is the policy of one farm.
type instance struct {
	mu     sync.Mutex   // held through every call of the policy but Decide
	use    sync.RWMutex // held for reading through Decide, else through Configure and Close
	policy Policy
	farm   Farm
	last   *Snapshot // as the policy returned it
	wire   *policypb.Snapshot
}

func newServer(p Plugin) *server {
	return &server{plugin: p, farms: map[string]*instance{}}
}

func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, in := range s.farms {
		in.close()
		delete(s.farms, name)
	}
}

func (in *instance) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.use.Lock()
	defer in.use.Unlock()
	closePolicy(in.policy)
}

func closePolicy(p Policy) {
	if c, ok := p.(interface{ Close() }); ok {
		c.Close()
	}
}

func (s *server) Describe(context.Context, *policypb.DescribeRequest) (*policypb.DescribeResponse, error) {
	r := &policypb.DescribeResponse{
		Name: s.plugin.Name, Version: s.plugin.Version, Kinds: s.plugin.Sends,
		Capabilities: []*policypb.Capability{{Name: CapabilityPush, Version: 1}},
		TickMs:       uint32(s.plugin.Tick / time.Millisecond), Ask: AskKeyToProto(s.plugin.Ask),
	}
	if s.plugin.Ask != nil {
		r.Capabilities = append(r.Capabilities, &policypb.Capability{Name: CapabilityAsk, Version: 1})
	}
	p := s.plugin.New()
	defer closePolicy(p)
	if sc, ok := p.(interface{ Schema() []byte }); ok {
		r.ConfigSchema = sc.Schema()
	}
	return r, nil
}

func (s *server) Configure(_ context.Context, r *policypb.ConfigureRequest) (*policypb.ConfigureResponse, error) {
	farm := FarmFromProto(r.GetFarm())
	if farm.Name == "" {
		return nil, status.Error(codes.InvalidArgument, "the farm has no name")
	}
	trial := s.plugin.New()
	err := trial.Configure(cloneFarm(farm), slices.Clone(r.GetConfig()))
	closePolicy(trial)
	if err != nil || r.GetCheckOnly() {
		return &policypb.ConfigureResponse{Errors: configErrors(err)}, nil
	}
	s.mu.Lock()
	in, ok := s.farms[farm.Name]
	if !ok {
		in = &instance{policy: s.plugin.New()}
	}
	s.mu.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	in.use.Lock()
	defer in.use.Unlock()
	if err := in.policy.Configure(cloneFarm(farm), r.GetConfig()); err != nil {
		if !ok {
			closePolicy(in.policy)
		}
		return &policypb.ConfigureResponse{Errors: configErrors(err)}, nil
	}
	in.farm = farm
	if !ok {
		s.mu.Lock()
		s.farms[farm.Name] = in
		s.mu.Unlock()
	}
	return &policypb.ConfigureResponse{}, nil
}

func (s *server) Forget(_ context.Context, r *policypb.ForgetRequest) (*policypb.ForgetResponse, error) {
	s.mu.Lock()
	in := s.farms[r.GetFarm()]
	delete(s.farms, r.GetFarm())
	s.mu.Unlock()
	if in != nil {
		in.close()
	}
	return &policypb.ForgetResponse{}, nil
}

func (s *server) Tick(_ context.Context, r *policypb.TickRequest) (*policypb.TickResponse, error) {
	s.mu.Lock()
	in := s.farms[r.GetFarm()]
	s.mu.Unlock()
	if in == nil {
		return nil, status.Errorf(codes.NotFound, "farm %q was not configured", r.GetFarm())
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	t := r.GetTelemetry()
	if t == nil {
		t = &Telemetry{}
	}
	snap, err := in.policy.Tick(cloneFarm(in.farm), t)
	if err != nil {
		return nil, status.Error(codes.Unknown, err.Error())
	}
	if snap != nil && snap != in.last {
		wire := SnapshotToProto(snap)
		wire.Generation = in.wire.GetGeneration()
		if in.wire == nil || !proto.Equal(wire, in.wire) {
			wire.Generation++
			in.wire = wire
		}
		in.last = snap
	}
	if in.wire == nil && snap == nil && len(s.plugin.Sends) == 0 {
		// A plugin that is only asked has nothing to send; this says that it is
		// there.
		in.wire = &policypb.Snapshot{Generation: 1}
	}
	if in.wire == nil || in.wire.GetGeneration() == r.GetHaveGeneration() {
		return &policypb.TickResponse{}, nil
	}
	return &policypb.TickResponse{Snapshot: in.wire}, nil
}

func cloneFarm(f Farm) Farm {
	f.Servers = slices.Clone(f.Servers)
	return f
}
