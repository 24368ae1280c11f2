// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

func TestDecode(t *testing.T) {
	type inner struct {
		Prefix  string
		Servers []string `json:"servers"`
		Reject  *uint16  `json:"reject"`
	}
	type config struct {
		Routes   []inner           `json:"routes"`
		Interval time.Duration     `json:"interval"`
		Net      netip.Prefix      `json:"net"`
		Score    float64           `json:"score"`
		Fall     int8              `json:"fall"`
		On       bool              `json:"on"`
		ByName   map[string]inner  `json:"by_name"`
		Raw      json.RawMessage   `json:"raw"`
		Any      any               `json:"any"`
		Labels   map[string]string `json:"labels"`
		hidden   int
	}
	c := config{Score: 3, Fall: 7}
	err := Decode([]byte(`{"routes":[{"prefix":"/a","servers":["s1"],"reject":403},{}],"interval":"1.5s","net":"192.0.2.0/24",
		"fall":-2,"on":true,"by_name":{"x":{"prefix":"/x"}},"raw":{"a":[1]},"any":"z","labels":null}`), &c)
	if err != nil {
		t.Fatal(err)
	}
	status := uint16(403)
	want := config{
		Routes: []inner{{"/a", []string{"s1"}, &status}, {}}, Interval: 1500 * time.Millisecond, Net: netip.MustParsePrefix("192.0.2.0/24"),
		Score: 3, Fall: -2, On: true, ByName: map[string]inner{"x": {Prefix: "/x"}}, Raw: json.RawMessage(`{"a":[1]}`), Any: "z",
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v\nwant %+v", c, want)
	}
	for _, c := range []struct{ in, want string }{
		{`{"routes":[{},{"perfix":"/a"}]}`, `config.routes[1].perfix: unknown key, expected one of prefix, servers, reject`},
		{`{"Routes":[]}`, `config.Routes: unknown key`},
		{`{"hidden":1}`, `config.hidden: unknown key`},
		{`{"routes":{}}`, `config.routes: is a map, expected a list`},
		{`{"routes":["x"]}`, `config.routes[0]: is a string, expected a map`},
		{`{"routes":[{"servers":"s1"}]}`, `config.routes[0].servers: is a string, expected a list`},
		{`{"routes":[{"servers":[1]}]}`, `config.routes[0].servers[0]: is a number, expected a string`},
		{`{"routes":[{"reject":70000}]}`, `config.routes[0].reject: is 70000, expected a whole number from 0 to 65535`},
		{`{"routes":[{"reject":-1}]}`, `config.routes[0].reject: is -1, expected a whole number from 0`},
		{`{"fall":1.5}`, `config.fall: is 1.5, expected a whole number of 8 bits`},
		{`{"fall":128}`, `config.fall: is 128`},
		{`{"score":"high"}`, `config.score: is a string, expected a number`},
		{`{"on":"yes"}`, `config.on: is a string, expected true or false`},
		{`{"interval":5}`, `config.interval: is a number, expected a duration such as "1.5s"`},
		{`{"interval":"soon"}`, `config.interval: "soon" is not a duration`},
		{`{"net":"here"}`, `config.net: `},
		{`{"by_name":{"x":{"y":1}}}`, `config.by_name.x.y: unknown key`},
		{`{"by_name":[]}`, `config.by_name: is a list, expected a map`},
		{`[]`, `config: is a list, expected a map`},
		{`{`, `config: is not JSON`},
		{`{"a":1,"b":2}`, "config.a: unknown key, expected one of routes, interval, net, score, fall, on, by_name, raw, any, labels\nconfig.b: unknown key"},
	} {
		var out config
		err := Decode([]byte(c.in), &out)
		var e *ConfigError
		if !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.in, err, c.want)
		}
		_ = out.hidden
	}
	for _, in := range []string{"", "null", "{}"} {
		if err := Decode([]byte(in), &c); err != nil {
			t.Errorf("%q: %v", in, err)
		}
	}
	if err := Decode(nil, c); err == nil {
		t.Error("a struct instead of a pointer is accepted")
	}
	var odd struct{ C chan int }
	if err := Decode([]byte(`{"c":1}`), &odd); err == nil {
		t.Error("a channel is filled")
	}
}

func TestConvertRoundTrip(t *testing.T) {
	in := &Snapshot{
		Plugin: "p",
		Routes: &Routes{Routes: []Route{
			{Host: "*.example.org", Path: "/a", Target: Target{Servers: []string{"s1", "s2"}}},
			{Prefix: "/b/", Target: Target{Servers: []string{"s1", "s2"}}},
			{Prefix: "/c/", Target: Target{Reject: 403, RetryAfter: 5}},
			{Prefix: "/d/", Target: Target{Redirect: 308, Location: "/e/"}},
			{Prefix: "/d/", Fields: []FieldMatch{{Field: Field{Name: "X-Tenant"}, Value: "a"}, {Field: Field{Name: "beta", Cookie: true}}}, Target: Target{Reject: 404}},
		}, Default: []string{"s3"}},
		Affinity: &Affinity{Key: AffinityKey{Field: Field{Name: "sid", Cookie: true}, Bits4: 24, Bits6: 64}, Table: []Pin{{Value: "x", Server: "s1"}}, Hash: true, Servers: []string{"s1", "s2"}},
		Budgets: &Budgets{
			Servers: []Budget{{Server: "s1", Rate: 1.5, Burst: 3, AtCap: snapshot.AtCapWait}, {Server: "s2", Rate: 1, Burst: 1}},
			Farm:    &Budget{Rate: 7, Burst: 8, AtCap: snapshot.AtCapIgnore},
		},
		Eligibility: &Eligibility{Servers: []Eligible{{Server: "s1", Reason: "tired"}, {Server: "s2", Eligible: true}}},
		Scores:      &Scores{Servers: []Score{{Server: "s1", Score: 2.5}}},
	}
	p := SnapshotToProto(in)
	if len(p.Routes.Sets) != 2 {
		t.Errorf("%d sets, want 2: equal ones are shared", len(p.Routes.Sets))
	}
	out, err := SnapshotFromProto("p", p, time.Now(), 0)
	if err != nil || !reflect.DeepEqual(in, out) {
		t.Errorf("%v\n got %+v\nwant %+v", err, out, in)
	}
	f := Farm{Name: "web", Servers: []Server{{"s1", "198.51.100.1:80", 3, true}}}
	if got := FarmFromProto(FarmToProto(f)); !reflect.DeepEqual(got, f) {
		t.Errorf("%+v", got)
	}
	set := uint32(4)
	for _, c := range []struct {
		p    *policypb.Routes
		want string
	}{
		{&policypb.Routes{Routes: []*policypb.Route{{Prefix: "/x", Action: &policypb.Route_Set{Set: 1}}}}, `route "/x": names set 1 of 0`},
		{&policypb.Routes{Routes: []*policypb.Route{{Prefix: "/x"}}}, "no action"},
		{&policypb.Routes{Routes: []*policypb.Route{{Action: &policypb.Route_Reject{Reject: &policypb.Reject{Status: 65936}}}}}, "status 65936"},
		{&policypb.Routes{Routes: []*policypb.Route{{Action: &policypb.Route_Redirect{Redirect: &policypb.Redirect{Status: 65838}}}}}, "status 65838"},
		{&policypb.Routes{DefaultSet: &set}, `route "default": names set 4 of 0`},
	} {
		_, err := SnapshotFromProto("p", &policypb.Snapshot{Routes: c.p}, time.Now(), 0)
		var e *snapshot.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}

func TestExpires(t *testing.T) {
	now := time.Unix(1000, 0)
	scores := &policypb.Scores{}
	for _, c := range []struct {
		p      *policypb.Snapshot
		expiry time.Duration
		want   time.Duration // 0: never
	}{
		{&policypb.Snapshot{Routes: &policypb.Routes{}, ValidMs: 5}, time.Second, 0},
		{&policypb.Snapshot{Scores: scores}, 0, 0},
		{&policypb.Snapshot{Scores: scores}, time.Second, time.Second},
		{&policypb.Snapshot{Scores: scores, ValidMs: 200}, time.Second, 200 * time.Millisecond},
		{&policypb.Snapshot{Scores: scores, ValidMs: 2000}, time.Second, time.Second},
		{&policypb.Snapshot{Scores: scores, ValidMs: 2000}, 0, 2 * time.Second},
		{&policypb.Snapshot{Scores: scores, ValidMs: 1 << 63}, time.Second, time.Second},
	} {
		want := int64(0)
		if c.want != 0 {
			want = now.Add(c.want).UnixNano()
		}
		if got := Expires(c.p, now, c.expiry); got != want {
			t.Errorf("%v, %v: %d, want %d", c.p, c.expiry, got, want)
		}
	}
	s := &Snapshot{Scores: &Scores{}, Expires: time.Now().Add(2500 * time.Millisecond).UnixNano()}
	if got := SnapshotToProto(s).ValidMs; got != 3000 {
		t.Errorf("valid for %d ms", got)
	}
}

// scripted is a policy whose answers the test holds.
type scripted struct {
	configure func(Farm, []byte) error
	tick      func(Farm, *Telemetry) (*Snapshot, error)
	closed    *int
}

func (s *scripted) Configure(f Farm, c []byte) error             { return s.configure(f, c) }
func (s *scripted) Tick(f Farm, t *Telemetry) (*Snapshot, error) { return s.tick(f, t) }
func (s *scripted) Close()                                       { *s.closed++ }
func (s *scripted) Schema() []byte                               { return []byte(`{"type":"object"}`) }

func TestServer(t *testing.T) {
	ctx := context.Background()
	made, closed := 0, 0
	var snap *Snapshot
	var tickErr error
	s := newServer(Plugin{Name: "p", Version: "1", Sends: []Kind{SendsScores}, New: func() Policy {
		made++
		return &scripted{
			configure: func(f Farm, c []byte) error {
				if bytes.Contains(c, []byte("bad")) {
					return errors.Join(Errorf("config.a", "is bad"), errors.Join(Errorf("config.b", "is worse"), errors.New("all is bad")))
				}
				return nil
			},
			tick:   func(Farm, *Telemetry) (*Snapshot, error) { return snap, tickErr },
			closed: &closed,
		}
	}})
	d, err := s.Describe(ctx, &policypb.DescribeRequest{})
	if err != nil || d.Name != "p" || d.Version != "1" || string(d.ConfigSchema) == "" || len(d.Kinds) != 1 || d.Capabilities[0].Name != CapabilityPush {
		t.Fatalf("%v %v", d, err)
	}
	farm := &policypb.Farm{Name: "web"}
	configure := func(config string, check bool) []*policypb.ConfigError {
		t.Helper()
		r, err := s.Configure(ctx, &policypb.ConfigureRequest{Farm: farm, Config: []byte(config), CheckOnly: check})
		if err != nil {
			t.Fatal(err)
		}
		return r.Errors
	}
	tick := func(have uint64) *policypb.Snapshot {
		t.Helper()
		r, err := s.Tick(ctx, &policypb.TickRequest{Farm: "web", HaveGeneration: have})
		if err != nil {
			t.Fatal(err)
		}
		return r.Snapshot
	}
	if errs := configure("bad", false); len(errs) != 3 || errs[0].Path != "config.a" || errs[1].Path != "config.b" || errs[2].Path != "" {
		t.Errorf("%v", errs)
	}
	if errs := configure("good", true); len(errs) != 0 {
		t.Errorf("%v", errs)
	}
	if _, err := s.Tick(ctx, &policypb.TickRequest{Farm: "web"}); status.Code(err) != codes.NotFound {
		t.Errorf("a farm that was only checked: %v", err)
	}
	if made != closed {
		t.Errorf("%d policies made and %d closed before any is in use", made, closed)
	}
	configure("good", false)
	if tick(0) != nil {
		t.Error("a snapshot although there is none")
	}
	snap = &Snapshot{Scores: &Scores{Servers: []Score{{Server: "s1", Score: 1}}}}
	if g := tick(0); g.GetGeneration() != 1 {
		t.Errorf("%v", g)
	}
	if tick(1) != nil {
		t.Error("sent again although the host has it")
	}
	snap = &Snapshot{Scores: &Scores{Servers: []Score{{Server: "s1", Score: 1}}}} // new and equal
	if tick(1) != nil {
		t.Error("an equal snapshot counts as new")
	}
	snap = &Snapshot{Scores: &Scores{Servers: []Score{{Server: "s1", Score: 2}}}}
	if g := tick(1); g.GetGeneration() != 2 {
		t.Errorf("%v", g)
	}
	snap = nil
	if tick(2) != nil {
		t.Error("nil means nothing new")
	}
	if g := tick(0); g.GetGeneration() != 2 {
		t.Errorf("a host that lost it does not get it again: %v", g)
	}
	tickErr = errors.New("no")
	if _, err := s.Tick(ctx, &policypb.TickRequest{Farm: "web"}); status.Convert(err).Message() != "no" {
		t.Errorf("%v", err)
	}
	if errs := configure("bad", false); len(errs) != 3 {
		t.Errorf("%v", errs)
	}
	if _, err := s.Configure(ctx, &policypb.ConfigureRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a farm without a name: %v", err)
	}
	if _, err := s.Forget(ctx, &policypb.ForgetRequest{Farm: "web"}); err != nil {
		t.Error(err)
	}
	configure("good", false)
	s.close()
	if made != closed {
		t.Errorf("%d policies made, %d closed", made, closed)
	}
}

func TestLogHandler(t *testing.T) {
	var b bytes.Buffer
	slog.New(logHandler(&b)).Warn("server is slow", "server", "s1")
	var m map[string]string
	if err := json.Unmarshal(b.Bytes(), &m); err != nil {
		t.Fatal(err)
	}
	if _, err := time.Parse("2006-01-02T15:04:05.000000Z07:00", m["@timestamp"]); err != nil || m["@level"] != "WARN" || m["@message"] != "server is slow" || m["server"] != "s1" {
		t.Errorf("%v %v", m, err)
	}
}

// TestExampleIsShort holds the promise that a plugin needs at most 40 lines.
func TestExampleIsShort(t *testing.T) {
	b, err := os.ReadFile("examples/prefer/main.go")
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n > 40 {
		t.Errorf("the example has %d lines", n)
	}
}

func TestUnits(t *testing.T) {
	for in, want := range map[string]float64{"100Mbit": 12.5e6, "1gbit": 125e6, "8": 1, "12mbps": 12e6, "1Kibit": 128, "0.5Gbit": 62.5e6} {
		var r Rate
		if err := r.UnmarshalText([]byte(in)); err != nil || float64(r) != want {
			t.Errorf("%s: %g, %v; want %g", in, float64(r), err, want)
		}
	}
	for _, in := range []string{"", "fast", "100MB", "-1Mbit", "1..2Mbit", "Mbit"} {
		if err := new(Rate).UnmarshalText([]byte(in)); err == nil {
			t.Errorf("rate %q is taken", in)
		}
	}
	for in, want := range map[string]Size{"0": 0, "65536": 65536, "64KiB": 65536, "2GiB": 2 << 30} {
		var s Size
		if err := s.UnmarshalText([]byte(in)); err != nil || s != want {
			t.Errorf("%s: %d, %v; want %d", in, s, err, want)
		}
	}
	for _, in := range []string{"", "1KB", "-1", "+1", "1.5MiB", "9999999999GiB"} {
		if err := new(Size).UnmarshalText([]byte(in)); err == nil {
			t.Errorf("size %q is taken", in)
		}
	}
	if got := Rate(2.5e6).String(); got != "20Mbit" {
		t.Error(got)
	}
}

func TestTelemetryHelpers(t *testing.T) {
	a := &Histogram{SumNanos: 1000, Counts: []uint64{2, 1}}
	b := &Histogram{SumNanos: 5000, Counts: []uint64{2, 2, 0, 1}}
	if m, n := Mean(b, a); m != 2000 || n != 2 {
		t.Errorf("mean %d of %d", m, n)
	}
	if m, n := Mean(a, b); m != 333 || n != 3 {
		t.Errorf("after a restart: mean %d of %d", m, n)
	}
	if m, n := Mean(a, a); m != 0 || n != 0 {
		t.Errorf("nothing new: mean %d of %d", m, n)
	}
	if Peak(b, a) != BoundOf(3) || Peak(a, a) != 0 || Peak(a, b) != BoundOf(1) || Peak(a, nil) != BoundOf(1) {
		t.Errorf("peaks %s %s %s %s", Peak(b, a), Peak(a, a), Peak(a, b), Peak(a, nil))
	}
	if m := Middle(b, a); m < BoundOf(1)*3/4 || m > BoundOf(3)*3/4 || Middle(a, a) != 0 {
		t.Errorf("middle %s", m)
	}
	if Since(5, 3) != 2 || Since(2, 3) != 2 {
		t.Error("Since is wrong")
	}
	tel := &Telemetry{Servers: []*ServerTelemetry{{Name: "s1", Active: 3}}}
	if TelemetryOf(tel, "s1").Active != 3 || TelemetryOf(tel, "s2") == nil || TelemetryOf(nil, "s2") == nil {
		t.Error("TelemetryOf is wrong")
	}
}

// asked is a policy that answers questions.
type asked struct {
	answer func(*Question) (*Answer, error)
}

func (*asked) Configure(Farm, []byte) error                  { return nil }
func (*asked) Tick(Farm, *Telemetry) (*Snapshot, error)      { return nil, nil }
func (a *asked) Decide(_ Farm, q *Question) (*Answer, error) { return a.answer(q) }

func TestDecide(t *testing.T) {
	ctx := context.Background()
	var got *Question
	var answer *Answer
	var fail error
	key := &AskKey{Method: true, Host: true, Path: true, Segments: 2, Fields: []Field{{Name: "X-Tenant"}, {Name: "sid", Cookie: true}}, Client: true, Bits4: 24}
	p := Plugin{Name: "p", Ask: key, New: func() Policy {
		return &asked{func(q *Question) (*Answer, error) { got = q; return answer, fail }}
	}}
	if err := p.check(); err != nil {
		t.Fatal(err)
	}
	s := newServer(p)
	d, err := s.Describe(ctx, nil)
	if err != nil || len(d.Capabilities) != 2 || d.Capabilities[1].Name != CapabilityAsk {
		t.Fatalf("%v, %v", d, err)
	}
	if k, err := AskKeyFromProto(d.Ask); err != nil || !k.Equal(key) {
		t.Errorf("%+v, %v", k, err)
	}
	if _, err := s.Decide(ctx, &policypb.DecideRequest{Farm: "web"}); status.Code(err) != codes.NotFound {
		t.Errorf("a farm that is not there: %v", err)
	}
	if _, err := s.Configure(ctx, &policypb.ConfigureRequest{Farm: &policypb.Farm{Name: "web", Servers: []*policypb.Server{{Name: "s1"}}}}); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Tick(ctx, &policypb.TickRequest{Farm: "web"}); err != nil || r.Snapshot.GetGeneration() != 1 {
		t.Errorf("a plugin that is only asked does not say that it is there: %v, %v", r, err)
	}
	q := &Question{Key: snapshot.Key{
		Method: "GET", Host: "a.example", Path: "/a/b", Client: netip.MustParsePrefix("198.51.100.0/24"),
		Fields: []snapshot.KeyField{{Field: Field{Name: "X-Tenant"}, Value: "blue", Present: true}, {Field: Field{Name: "sid", Cookie: true}}},
	}, Attempt: 2, Tried: []string{"s1"}}
	decide := func() (*policypb.DecideResponse, error) { return s.Decide(ctx, QuestionToProto("web", q)) }
	answer = &Answer{Servers: []string{"s1"}, Scores: map[string]float64{"s1": 3}, TTL: 1500 * time.Millisecond, Mark: 9, Ban: time.Minute}
	r, err := decide()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, q) || got.Header("x-tenant") != "blue" || got.Cookie("sid") != "" || got.Header("sid") != "" {
		t.Errorf("%+v\nwant %+v", got, q)
	}
	a, ttl, err := AnswerFromProto(r)
	if err != nil || ttl != 1500*time.Millisecond || !reflect.DeepEqual(*a, snapshot.Answer{Servers: []Score{{Server: "s1", Score: 3}}, Mark: 9, Ban: 60}) {
		t.Errorf("%+v %v %v", a, ttl, err)
	}
	for _, c := range []struct {
		a    *Answer
		want snapshot.Answer
		bad  bool
	}{
		{nil, snapshot.Answer{}, false},
		{&Answer{Reject: 403, RetryAfter: 2}, snapshot.Answer{Reject: 403, RetryAfter: 2}, false},
		{&Answer{Redirect: 302, Location: "/x"}, snapshot.Answer{Redirect: 302, Location: "/x"}, false},
		{&Answer{Servers: []string{"s9"}}, snapshot.Answer{}, true},
		{&Answer{Reject: 403, Redirect: 302}, snapshot.Answer{}, true},
	} {
		answer = c.a
		r, err := decide()
		if (err != nil) != c.bad {
			t.Errorf("%+v: %v", c.a, err)
		}
		if err != nil {
			continue
		}
		if a, _, err := AnswerFromProto(r); err != nil || !reflect.DeepEqual(*a, c.want) {
			t.Errorf("%+v: %+v, %v", c.a, a, err)
		}
	}
	fail = errors.New("no idea")
	if _, err := decide(); status.Convert(err).Message() != "no idea" {
		t.Error(err)
	}
	for _, r := range []*policypb.DecideResponse{
		{Answer: &policypb.DecideResponse_Servers{Servers: &policypb.ServerChoice{}}},
		{Answer: &policypb.DecideResponse_Reject{Reject: &policypb.Reject{Status: 65936}}},
		{Answer: &policypb.DecideResponse_Redirect{Redirect: &policypb.Redirect{Status: 65838}}},
	} {
		if _, _, err := AnswerFromProto(r); err == nil {
			t.Errorf("%v is taken", r)
		}
	}
	bad := Plugin{Name: "p", Ask: key, New: func() Policy { return &scripted{closed: new(int)} }}
	if err := bad.check(); err == nil {
		t.Error("Plugin.Ask without Decide is taken")
	}
}
