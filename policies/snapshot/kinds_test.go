// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
)

const second = int64(1e9)

func budgetPolicy(on OnEmpty, b Budgets) Policy {
	return Policy{Name: "bandwidth", OnEmpty: on, Snapshot: &Snapshot{Budgets: &b}}
}

// TestBudgetOverTime: a bucket gives its burst, goes into debt, earns it back
// at its rate, and never holds more than the burst.
func TestBudgetOverTime(t *testing.T) {
	s := mustSelector(t, farm(2), budgetPolicy(OnEmptyDefault, Budgets{Servers: []Budget{{Server: "s1", Rate: 1000, Burst: 500}}}))
	live := lives(2)
	var sc Scratch
	at := int64(100) * second
	gets := func() bool {
		t.Helper()
		for rnd := range uint64(64) {
			c := s.Choose(&Request{Now: at}, live, nil, rnd, &sc)
			if c.Kind != ChoiceServer {
				t.Fatalf("%+v", c)
			}
			if c.Server == 0 {
				return true
			}
		}
		return false
	}
	live[0].Spent.Store(1 << 40) // before the first look: nothing to do with us
	for i, step := range []struct {
		spend, wait int64
		want        bool
	}{
		{0, 0, true},
		{500, 0, true},           // empty, and not in debt
		{1, 0, false},            // one byte of debt
		{0, second / 2000, true}, // half a byte is still missing, but half a millisecond earns it
		{0, 10 * second, true},   // full again: 500, not 10,000
		{501, 0, false},
		{2000, second, false}, // −1501
		{0, second, false},    // −501
		{0, second, true},
	} {
		live[0].Spent.Add(step.spend)
		if at += step.wait; gets() != step.want && i != 3 {
			t.Errorf("step %d: server s1 is drawn: %v, want %v", i, !step.want, step.want)
		}
	}
}

// TestBudgetShared: many choices at once take a surplus away once.
func TestBudgetShared(t *testing.T) {
	s := mustSelector(t, farm(1), budgetPolicy(OnEmptyReject, Budgets{Servers: []Budget{{Server: "s1", Rate: 1e6, Burst: 1000}}}))
	live := lives(1)
	b := &s.policies[0].budgets.servers[0]
	b.level(second, 0)
	for round := range int64(100) {
		now := second * (2 + round)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { s.Choose(&Request{Now: now}, live, nil, 1, new(Scratch)) })
		}
		wg.Wait()
		if got := b.level(now, 0); math.Abs(got-1000) > 1 {
			t.Fatalf("round %d: %g bytes, want 1000", round, got)
		}
	}
}

func TestBudgetAtCap(t *testing.T) {
	debt := func(b *Budgets, on OnEmpty, servers int) Choice {
		t.Helper()
		s := mustSelector(t, farm(servers), budgetPolicy(on, *b))
		live := lives(servers)
		f := &FarmLive{}
		var sc Scratch
		s.Choose(&Request{Now: second, Farm: f}, live, nil, 1, &sc)
		s.Choose(&Request{Now: second, Farm: f}, live, nil, 1, &sc)
		live[0].Spent.Add(1e6)
		f.Spent.Add(1e6)
		return s.Choose(&Request{Now: second, Farm: f}, live, nil, 1, &sc)
	}
	one := func(a AtCap) *Budgets {
		return &Budgets{Servers: []Budget{{Server: "s1", Rate: 1, Burst: 1, AtCap: a}}}
	}
	whole := func(a AtCap) *Budgets { return &Budgets{Farm: &Budget{Rate: 1, Burst: 1, AtCap: a}} }
	for _, c := range []struct {
		b       *Budgets
		on      OnEmpty
		servers int
		want    string
	}{
		{one(AtCapSkip), OnEmptyDefault, 2, "server 1"},
		{one(AtCapWait), OnEmptyDefault, 2, "server 1"},
		{one(AtCapSkip), OnEmptyDefault, 1, "server 0"}, // ignored
		{one(AtCapWait), OnEmptyDefault, 1, "wait 0"},
		{one(AtCapIgnore), OnEmptyReject, 1, "server 0"},
		{one(AtCapSkip), OnEmptyReject, 1, "reject 503"},
		{one(AtCapSkip), OnEmptyWait, 1, "wait 0"},
		{one(AtCapWait), OnEmptyReject, 1, "reject 503"},
		{one(AtCapWait), OnEmptyIgnore, 1, "server 0"},
		{whole(AtCapSkip), OnEmptyDefault, 1, "server 0"},
		{whole(AtCapWait), OnEmptyDefault, 2, "wait 0"},
		{whole(AtCapSkip), OnEmptyReject, 2, "reject 503"},
		{whole(AtCapIgnore), OnEmptyReject, 1, "server 0"},
	} {
		got := debt(c.b, c.on, c.servers)
		s := fmt.Sprint(got.Kind, " ", got.Status)
		if got.Kind == ChoiceServer {
			s = fmt.Sprint("server ", got.Server)
			if ignored := c.want == "server 0" && (len(c.b.Servers) > 0 && c.b.Servers[0].AtCap != AtCapIgnore || c.b.Farm != nil && c.b.Farm.AtCap != AtCapIgnore); (got.Emptied == 1) != ignored {
				t.Errorf("%+v: emptied %b", c, got.Emptied)
			}
		} else if got.Reason != ReasonOverBudget {
			t.Errorf("%+v: reason %s", c, got.Reason)
		}
		if s != c.want {
			t.Errorf("%+v: %s", c, s)
		}
	}
}

// TestBudgetSurvivesSelectors: neither a new snapshot nor another rate forgives
// a debt.
func TestBudgetSurvivesSelectors(t *testing.T) {
	list := func(rate, burst float64) []Policy {
		return []Policy{budgetPolicy(OnEmptyReject, Budgets{Servers: []Budget{{Server: "s1", Rate: rate, Burst: burst}}, Farm: &Budget{Rate: 1e9, Burst: 1e9}})}
	}
	s := mustSelector(t, farm(1), list(100, 100)...)
	live := lives(1)
	now := second
	kind := func() ChoiceKind {
		return s.Choose(&Request{Now: now, Farm: &FarmLive{}}, live, nil, 1, new(Scratch)).Kind
	}
	with := func(rate, burst float64) {
		t.Helper()
		n, err := s.With(list(rate, burst))
		if err != nil {
			t.Fatal(err)
		}
		s = n
	}
	kind()
	live[0].Spent.Add(300) // 200 in debt
	with(100, 100)
	if kind() != ChoiceReject {
		t.Fatal("a new snapshot with the same budget forgives a debt")
	}
	with(50, 100)
	with(25, 100) // never looked at in between
	with(50, 100)
	if kind() != ChoiceReject {
		t.Fatal("a new rate forgives a debt")
	}
	if now += 3 * second; kind() != ChoiceReject {
		t.Fatal("200 bytes are paid back at 50 a second within three seconds")
	}
	if now += 2 * second; kind() != ChoiceServer {
		t.Fatal("200 bytes are not paid back at 50 a second within five seconds")
	}
	n := mustSelector(t, farm(3), list(50, 100)...)
	live[0].Spent.Add(1000)
	n.Adopt(s)
	s, live = n, []*Live{live[0], {}, {}}
	live[1].State.Store(uint32(Down))
	live[2].State.Store(uint32(Down))
	if kind() != ChoiceReject {
		t.Error("other servers forgive a debt")
	}
	if !s.Budgeted(0) || !s.Budgeted(2) || mustSelector(t, farm(2)).Budgeted(0) {
		t.Error("Budgeted is wrong")
	}
}

func affinity(a Affinity) Policy {
	return Policy{Name: "sticky", Snapshot: &Snapshot{Affinity: &a}}
}

func TestAffinity(t *testing.T) {
	var sc Scratch
	servers := farm(6)
	servers[5].Backup = true
	tenant := AffinityKey{Field: Field{Name: "X-Tenant"}}
	s := mustSelector(t, servers,
		affinity(Affinity{Key: tenant, Table: []Pin{{"blue", "s3"}, {"rare", "s6"}}, Hash: true, Servers: []string{"s1", "s2", "s4"}}),
		Policy{Name: "state", Snapshot: &Snapshot{Eligibility: &Eligibility{Servers: []Eligible{{Server: "s4"}}}}})
	live := lives(6)
	ask := func(value string, rnd uint64) Choice {
		r := &Request{}
		if value != "" {
			r.Fields = [][]byte{[]byte(value)}
		}
		return s.Choose(r, live, nil, rnd, &sc)
	}
	hashed := map[uint16]int{}
	for rnd := range uint64(300) {
		if c := ask("blue", rnd); c.Server != 2 || c.Reason != ReasonAffinity || c.Policy != 0 {
			t.Fatalf("blue: %+v", c)
		}
		if c := ask("rare", rnd); c.Server != 5 {
			t.Fatalf("the table leads to a backup: %+v", c)
		}
		c := ask(fmt.Sprint("tenant-", rnd%100), rnd)
		if d := ask(fmt.Sprint("tenant-", rnd%100), rnd+1); c.Reason == ReasonAffinity && c.Server != d.Server {
			t.Fatalf("one value, two servers: %+v, %+v", c, d)
		}
		if c.Reason == ReasonAffinity {
			hashed[c.Server]++
		} else if c.Skipped != 1 || c.Server == 3 {
			t.Fatalf("a server that is not eligible: %+v", c)
		}
		if c := ask("", rnd); c.Reason != ReasonPicked || c.Skipped != 0 {
			t.Fatalf("without the field: %+v", c)
		}
	}
	if len(hashed) != 2 || hashed[0] == 0 || hashed[1] == 0 {
		t.Errorf("hashed over %v, want servers 0 and 1", hashed)
	}
	live[2].State.Store(uint32(Down))
	if c := ask("blue", 1); c.Server == 2 || c.Skipped != 1 {
		t.Errorf("the server is down: %+v", c)
	}

	live[2].State.Store(uint32(Ready))

	// By cookie, and by the network of the client.
	s = mustSelector(t, servers, affinity(Affinity{Key: AffinityKey{Field: Field{Name: "sid", Cookie: true}}, Table: []Pin{{"7", "s2"}}}))
	for cookie, want := range map[string]Reason{"sid=7": ReasonAffinity, "a=b;sid=7 ; c": ReasonAffinity, "xsid=7": ReasonPicked, "sid=": ReasonPicked, "sid=77": ReasonPicked} {
		if c := ask(cookie, 1); c.Reason != want {
			t.Errorf("%q: %+v", cookie, c)
		}
	}
	s = mustSelector(t, servers, affinity(Affinity{Key: AffinityKey{Bits4: 24, Bits6: 60}, Table: []Pin{{"198.51.100.0", "s2"}, {"2001:db8::", "s3"}}}))
	for addr, want := range map[string]int{"198.51.100.77": 1, "198.51.101.77": -1, "2001:db8:0:f::1": 2, "2001:db8:0:10::1": -1} {
		a, err := parseAddress(addr)
		if err != nil {
			t.Fatal(err)
		}
		c := s.Choose(&Request{Client: a}, live, nil, 1, &sc)
		if (c.Reason == ReasonAffinity) != (want >= 0) || want >= 0 && int(c.Server) != want {
			t.Errorf("%s: %+v, want %d", addr, c, want)
		}
	}
}

// TestRendezvous: shares follow the weights, and a server that goes takes only
// its own values with it.
func TestRendezvous(t *testing.T) {
	servers := farm(8)
	for i := range servers {
		servers[i].Weight = uint32(1 + i%3)
	}
	names := func(skip int) (out []string) {
		for i := range servers {
			if i != skip {
				out = append(out, servers[i].Name)
			}
		}
		return out
	}
	table := func(skip int) *affinityTable {
		return mustSelector(t, servers, affinity(Affinity{Hash: true, Servers: names(skip)})).policies[0].affinity
	}
	all, less := table(-1), table(3)
	const n = 60000
	var got [8]int
	moved := 0
	for i := range n {
		h := hashValue(fmt.Append(nil, i))
		a, b := all.rendezvous(h), less.rendezvous(h)
		got[a]++
		if a != b {
			moved++
			if a != 3 {
				t.Fatalf("value %d moves from server %d, which is still there, to %d", i, a, b)
			}
		}
	}
	total := 0
	for _, s := range servers {
		total += int(s.Weight)
	}
	for i, s := range servers {
		want := float64(n) * float64(s.Weight) / float64(total)
		if math.Abs(float64(got[i])-want) > 5*math.Sqrt(want) {
			t.Errorf("server %d of weight %d has %d values, want about %.0f", i, s.Weight, got[i], want)
		}
	}
	if moved != got[3] {
		t.Errorf("%d values move, the server had %d", moved, got[3])
	}
}

func TestAsk(t *testing.T) {
	var sc Scratch
	key := AskKey{Method: true, Host: true, Path: true, Segments: 2, Fields: []Field{{Name: "X-Tenant"}, {Name: "sid", Cookie: true}}, Client: true, Bits4: 24}
	p := Policy{Name: "auth", Ask: &key, OnEmpty: OnEmptyReject}
	s := mustSelector(t, farm(3), p, routePolicy(Route{Target: to("s1", "s2")}))
	live := lives(3)
	client, _ := parseAddress("198.51.100.77")
	r := &Request{Method: []byte("GET"), Host: []byte("A.example:80"), Path: []byte("/a/b/c?d"), Client: client, Fields: [][]byte{nil, []byte("x=1; sid=42")}}
	c := s.Choose(r, live, nil, 1, &sc)
	if c.Kind != ChoiceAsk || s.PolicyName(int(c.Policy)) != "auth" {
		t.Fatalf("%+v", c)
	}
	b, ok := s.AppendKey([]byte("x"), 0, r, &sc)
	if !ok {
		t.Fatal("the key is too large")
	}
	k, err := key.ParseKey(b[1:])
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%+v", k); got != "{Method:GET Host:a.example Path:/a/b Fields:[{Field:x-tenant Value: Present:false} {Field:cookie sid Value:42 Present:true}] Client:198.51.100.0/24}" {
		t.Error(got)
	}
	for i := range b[1:] {
		if _, err := key.ParseKey(b[1 : 1+i]); err == nil {
			t.Errorf("%d of %d bytes of a key are taken for one", i, len(b)-1)
		}
	}
	r.Fields[0] = make([]byte, MaxQuestion)
	if _, ok := s.AppendKey(nil, 0, r, &sc); ok {
		t.Error("a key beyond the limit is taken")
	}
	r.Fields[0] = nil

	answer := func(a Answer) Choice {
		t.Helper()
		ca, err := s.CompileAnswer("auth", &a)
		if err != nil {
			t.Fatal(err)
		}
		r.Answers = []Answered{{"auth", ca}}
		return s.Choose(r, live, nil, 1, &sc)
	}
	if c := answer(Answer{Servers: []Score{{Server: "s2"}, {Server: "s3", Score: 5}}, Mark: 7, Ban: 3}); c.Kind != ChoiceServer || c.Server != 1 || c.Mark != 7 || c.Ban != 3 {
		t.Errorf("%+v", c)
	}
	if c := answer(Answer{Reject: 429, RetryAfter: 9, Ban: 60}); c.Kind != ChoiceReject || c.Status != 429 || c.RetryAfter != 9 || c.Ban != 60 {
		t.Errorf("%+v", c)
	}
	if c := answer(Answer{Redirect: 302, Location: "/login"}); c.Kind != ChoiceRedirect || c.Location != "/login" {
		t.Errorf("%+v", c)
	}
	if c := answer(Answer{}); c.Kind != ChoiceServer {
		t.Errorf("no opinion: %+v", c)
	}
	if c := answer(Answer{Servers: []Score{{Server: "s3"}}}); c.Kind != ChoiceReject || c.Reason != ReasonRouteEmpty {
		t.Errorf("the routes leave none of the answer: %+v", c)
	}
	live[2].State.Store(uint32(Down))
	if c := answer(Answer{Servers: []Score{{Server: "s3"}}}); c.Kind != ChoiceReject || c.Reason != ReasonAnswerEmpty {
		t.Errorf("none of the answer is ready: %+v", c)
	}
	r.Answers = []Answered{{"auth", Unanswered}}
	if c := s.Choose(r, live, nil, 1, &sc); c.Kind != ChoiceServer {
		t.Errorf("ignored: %+v", c)
	}
	p.Fallback = FallbackReject
	s = mustSelector(t, farm(3), p)
	if c := s.Choose(r, live, nil, 1, &sc); c.Kind != ChoiceReject || c.Status != 503 || c.Reason != ReasonUnanswered {
		t.Errorf("rejected: %+v", c)
	}
	for _, a := range []Answer{{Servers: []Score{{Server: "s9"}}}, {Reject: 200}, {Redirect: 302}, {Reject: 403, Servers: []Score{{Server: "s1"}}}, {Servers: []Score{{"s1", math.NaN()}}}} {
		if _, err := s.CompileAnswer("auth", &a); err == nil {
			t.Errorf("%+v is taken", a)
		}
	}
}

// TestAnswerScores: the scores of an answer weigh as those of a snapshot, in a
// small farm and in a large one.
func TestAnswerScores(t *testing.T) {
	for _, n := range []int{2, 100} {
		s := mustSelector(t, farm(n), Policy{Name: "ask", Ask: &AskKey{Path: true}})
		a := Answer{}
		for i := range n {
			a.Servers = append(a.Servers, Score{fmt.Sprint("s", i+1), 1})
		}
		a.Servers[0].Score = 20
		ca, err := s.CompileAnswer("ask", &a)
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		r := &Request{Answers: []Answered{{"ask", ca}}}
		for i := range uint64(2000) {
			if s.Choose(r, lives(n), nil, i*77, new(Scratch)).Server == 0 {
				got++
			}
		}
		if want := 2000 * 20 / (19 + n); got < want*3/4 {
			t.Errorf("%d servers: the preferred one has %d of 2000, want about %d or more", n, got, want)
		}
	}
}

func TestShadow(t *testing.T) {
	live := lives(4)
	live[0].Spent.Store(0)
	var sc Scratch
	sticky := affinity(Affinity{Key: AffinityKey{Field: Field{Name: "t"}}, Table: []Pin{{"x", "s1"}}})
	for _, c := range []struct {
		name       string
		p          Policy
		path       string
		field      string
		opinion    bool
		disagrees  bool
		everything bool // the farm's real policy rejects
	}{
		{name: "route agrees", p: routePolicy(Route{Target: to("s1")}), opinion: true},
		{name: "route forbids", p: routePolicy(Route{Target: to("s2")}), opinion: true, disagrees: true},
		{name: "no route", p: routePolicy(Route{Prefix: "/x/", Target: to("s1")}), opinion: true, disagrees: true},
		{name: "rejects", p: routePolicy(Route{Target: Target{Reject: 403}}), opinion: true, disagrees: true},
		{name: "rejects the same", p: routePolicy(Route{Target: Target{Reject: 403}}), opinion: true, everything: true},
		{name: "rejects otherwise", p: routePolicy(Route{Target: Target{Reject: 404}}), opinion: true, disagrees: true, everything: true},
		{name: "not eligible", p: Policy{Name: "e", Snapshot: &Snapshot{Eligibility: &Eligibility{Servers: []Eligible{{Server: "s1"}}}}}, opinion: true, disagrees: true},
		{name: "eligible", p: Policy{Name: "e", Snapshot: &Snapshot{Eligibility: &Eligibility{}}}, opinion: true},
		{name: "expired", p: Policy{Name: "e", Snapshot: &Snapshot{Expires: 1, Eligibility: &Eligibility{Servers: []Eligible{{Server: "s1"}}}}}},
		{name: "affinity elsewhere, but no candidate", p: affinity(Affinity{Key: AffinityKey{Field: Field{Name: "t"}}, Table: []Pin{{"x", "s2"}}}), field: "x"},
		{name: "affinity", p: sticky, field: "x", opinion: true},
		{name: "no affinity", p: sticky, field: "y"},
		{name: "scores", p: Policy{Name: "l", Snapshot: &Snapshot{Scores: &Scores{}}}, opinion: true},
		{name: "nothing yet", p: Policy{Name: "l"}},
	} {
		real := routePolicy(Route{Target: to("s1")})
		if c.everything {
			real = routePolicy(Route{Target: Target{Reject: 403}})
		}
		c.p.Shadow, c.p.RoutePolicy = true, false
		s := mustSelector(t, farm(4), real, c.p)
		if len(s.Missing()) != 0 {
			t.Errorf("%s: the farm waits for a shadow", c.name)
		}
		r := &Request{Now: 5, Path: []byte("/")}
		if c.field != "" {
			r.Fields = [][]byte{[]byte(c.field)}
		}
		got := s.Choose(r, live, nil, 1, &sc)
		if !c.everything && (got.Kind != ChoiceServer || got.Server != 0) {
			t.Errorf("%s: the shadow has an effect: %+v", c.name, got)
		}
		if (got.Compared == 2) != c.opinion || (got.Disagreed == 2) != c.disagrees {
			t.Errorf("%s: compared %b, disagreed %b", c.name, got.Compared, got.Disagreed)
		}
	}
	// Scores that make a server certain disagree sometimes.
	s := mustSelector(t, farm(4), Policy{Name: "l", Shadow: true, Snapshot: &Snapshot{Scores: &Scores{Servers: []Score{{"s1", 100}}}}})
	other := 0
	for i := range uint64(200) {
		c := s.Choose(&Request{}, live, nil, i*99, &sc)
		if c.Disagreed != 0 {
			other++
			if c.Server == 0 {
				t.Fatal("the shadow wanted the server that was taken")
			}
		}
	}
	if other < 50 {
		t.Errorf("%d of 200 disagree", other)
	}
}

func TestKindsErrors(t *testing.T) {
	long := strings.Repeat("x", 41)
	var many []FieldMatch
	for i := range MaxFields + 1 {
		many = append(many, FieldMatch{Field: Field{Name: fmt.Sprint("f", i)}})
	}
	for _, c := range []struct {
		p    Policy
		want string
	}{
		{budgetPolicy(0, Budgets{Servers: []Budget{{Server: "s9", Rate: 1, Burst: 1}}}), `server "s9" is not`},
		{budgetPolicy(0, Budgets{Servers: []Budget{{Server: "s1", Rate: 0, Burst: 1}}}), "0 bytes per second"},
		{budgetPolicy(0, Budgets{Servers: []Budget{{Server: "s1", Rate: math.NaN(), Burst: 1}}}), "bytes per second"},
		{budgetPolicy(0, Budgets{Servers: []Budget{{Server: "s1", Rate: 1}}}), "burst of 0"},
		{budgetPolicy(0, Budgets{Servers: []Budget{{Server: "s1", Rate: 1, Burst: 1}, {Server: "s1", Rate: 1, Burst: 1}}}), "two budgets"},
		{budgetPolicy(0, Budgets{Farm: &Budget{Rate: -1, Burst: 1}}), "whole farm"},
		{affinity(Affinity{Key: AffinityKey{Field: Field{Name: "a b"}}}), "header field"},
		{affinity(Affinity{Key: AffinityKey{Field: Field{Name: long}}}), "1 to 40"},
		{affinity(Affinity{Table: []Pin{{"here", "s1"}}}), "not an address"},
		{affinity(Affinity{Key: AffinityKey{Bits4: 24}, Table: []Pin{{"198.51.100.1", "s1"}, {"198.51.100.2", "s2"}}}), "there twice"},
		{affinity(Affinity{Hash: true, Servers: []string{"s9"}}), `"s9" is not`},
		{affinity(Affinity{Key: AffinityKey{Bits4: 33}}), "33 bits"},
		{Policy{Name: "a", Ask: &AskKey{Fields: []Field{{Name: ""}}}}, "asks for header field"},
		{routePolicy(Route{Fields: many, Target: to("s1")}), "more than 16"},
		{routePolicy(Route{Fields: many[:1], Target: to("s1")}, Route{Fields: []FieldMatch{{Field: Field{Name: "F0"}}}, Target: to("s1")}), "there twice"},
	} {
		if _, err := NewSelector(farm(2), []Policy{c.p}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}

// TestFieldsMakeRoom: names that no policy uses any more do not keep new ones
// out.
func TestFieldsMakeRoom(t *testing.T) {
	s := mustSelector(t, farm(1))
	for i := range 3 * MaxFields {
		n, err := s.With([]Policy{routePolicy(Route{Fields: []FieldMatch{{Field: Field{Name: fmt.Sprint("f", i)}, Value: "1"}}, Target: to("s1")})})
		if err != nil {
			t.Fatal(err)
		}
		s = n
		r := &Request{Fields: make([][]byte, len(s.Fields()))}
		for j, name := range s.Fields() {
			if name == fmt.Sprint("f", i) {
				r.Fields[j] = []byte("1")
			}
		}
		if c := s.Choose(r, lives(1), nil, 1, new(Scratch)); c.Kind != ChoiceServer {
			t.Fatalf("%d: %+v", i, c)
		}
	}
}

func TestKindsAllocations(t *testing.T) {
	s := mustSelector(t, farm(100),
		routePolicy(Route{Fields: []FieldMatch{{Field: Field{Name: "x-tenant"}, Value: "a"}}, Target: to("s1", "s2")}, Route{Target: to("s3", "s4")}),
		affinity(Affinity{Key: AffinityKey{Field: Field{Name: "sid", Cookie: true}}, Hash: true}),
		budgetPolicy(0, Budgets{Servers: []Budget{{Server: "s1", Rate: 1, Burst: 1}}, Farm: &Budget{Rate: 1, Burst: 1}}),
		Policy{Name: "shadow", Shadow: true, Snapshot: &Snapshot{Scores: &Scores{Servers: []Score{{"s1", 3}}}}},
		Policy{Name: "ask", Ask: &AskKey{Path: true, Fields: []Field{{Name: "x-tenant"}}}})
	live := lives(100)
	a, err := s.CompileAnswer("ask", &Answer{Servers: []Score{{"s1", 2}, {"s3", 1}}})
	if err != nil {
		t.Fatal(err)
	}
	var sc Scratch
	buf := make([]byte, 0, 4096)
	r := &Request{Path: []byte("/a"), Fields: [][]byte{[]byte("a"), []byte("sid=7")}, Farm: &FarmLive{}}
	if n := testing.AllocsPerRun(200, func() {
		r.Answers = nil
		s.Choose(r, live, nil, 3, &sc)
		s.AppendKey(buf, 4, r, &sc)
		r.Answers = []Answered{{"ask", a}}
		s.Choose(r, live, nil, 3, &sc)
	}); n > 1 { // the list of answers above is ours
		t.Errorf("%v allocations", n)
	}
}
