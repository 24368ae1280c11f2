// SPDX-License-Identifier: Apache-2.0

package control

import (
	"encoding/json"
	"reflect"
	"strings"
	"sync"
	"testing"
)

// TestFlowJSON: the quick writer and reader agree with encoding/json.
func TestFlowJSON(t *testing.T) {
	for _, f := range []Flow{
		{},
		{Client: "198.18.0.1:1", VIP: "[2001:db8::1]:80", Farm: "web", State: "head"},
		{
			Client: "a", VIP: "b", Farm: "c", State: "d", Server: "e", Remote: "f", SNIP: "g", ServerState: "h", Method: "GET",
			AgeMS: 1 << 40, IdleMS: -1, Held: 3, Added: 4, Attempts: 5, Shard: 6,
		},
	} {
		want, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		got := f.AppendJSON(nil)
		if string(got) != string(want) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		var again Flow
		if !again.read(got) || again != f {
			t.Errorf("read %+v from %s", again, got)
		}
		if err := again.ReadJSON([]byte(" " + strings.Replace(string(got), ",", " , ", 2) + " ")); err != nil || again != f {
			t.Errorf("read %+v, %v", again, err)
		}
	}
	// A newer instance may say more, and with escapes.
	var f Flow
	if err := f.ReadJSON([]byte(`{"client":"a\u0062","new":{"x":[1]},"held":7}`)); err != nil || f.Client != "ab" || f.Held != 7 {
		t.Errorf("%+v, %v", f, err)
	}
	for _, bad := range []string{"", "{", `{"held":}`, `{"held":1 2}`, `{"client":"a"`, `{"client"}`, `{"client":"a" "vip":"b"}`} {
		if err := f.ReadJSON([]byte(bad)); err == nil {
			t.Errorf("%q is read as %+v", bad, f)
		}
	}
	// Every field is known to the quick reader.
	if n := reflect.TypeFor[Flow]().NumField(); n != 15 {
		t.Errorf("a Flow has %d fields: teach AppendJSON and read the new ones", n)
	}
}

// TestEvents: readers get each event once, in order, and the slow ones lose
// the oldest and are told so.
func TestEvents(t *testing.T) {
	var e Events
	if list, lost, _ := e.After(0); len(list) != 0 || lost != 0 || e.Last() != 0 {
		t.Error("an empty one has events")
	}
	_, _, more := e.After(0)
	e.Add(Event{Name: "first"})
	<-more
	list, lost, more := e.After(0)
	if len(list) != 1 || lost != 0 || list[0].Seq != 1 || list[0].Level != LevelInfo || list[0].Time.IsZero() {
		t.Errorf("%+v", list)
	}
	select {
	case <-more:
		t.Error("more without an event")
	default:
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range eventsKept {
				e.Add(Event{Name: "x"})
			}
		})
	}
	read, seq := 0, uint64(1)
	for seq < 4*eventsKept+1 {
		list, lost, more := e.After(seq)
		seq += lost
		for _, ev := range list {
			if ev.Seq != seq+1 {
				t.Fatalf("event %d after %d", ev.Seq, seq)
			}
			seq, read = ev.Seq, read+1
		}
		if len(list) == 0 {
			<-more
		}
	}
	wg.Wait()
	if list, lost, _ := e.After(1); len(list) != eventsKept || lost != 3*eventsKept {
		t.Errorf("%d kept, %d lost", len(list), lost)
	}
	if list, _, _ := e.After(1 << 40); len(list) != 0 {
		t.Error("events from the future")
	}
}

// TestParseClient reads what users write.
func TestParseClient(t *testing.T) {
	for in, want := range map[string]string{
		"198.18.0.1": "198.18.0.1/32 0", "198.18.0.1:99": "198.18.0.1/32 99", "198.18.7.1/16": "198.18.0.0/16 0",
		"2001:db8::1": "2001:db8::1/128 0", "[2001:db8::1]:7": "2001:db8::1/128 7", "::ffff:198.18.0.1": "198.18.0.1/32 0",
		"x": "", "": "", "198.18.0.1:99999": "",
	} {
		p, port, err := ParseClient(in)
		got := ""
		if err == nil {
			got = p.String() + " " + string(json.Number(jsonInt(port)))
		}
		if got != want {
			t.Errorf("%q: %q, %v, want %q", in, got, err, want)
		}
	}
	q := FlowFilter{Farm: "web", State: "head", Limit: 3, Port: 5}
	q.Client, _, _ = ParseClient("198.18.0.1")
	again, err := ParseFlowFilter(q.Query().Get)
	if err != nil || !reflect.DeepEqual(q, again) {
		t.Errorf("%+v, %v, want %+v", again, err, q)
	}
}

func jsonInt(n uint16) string {
	b, _ := json.Marshal(n) // A number is always written.
	return string(b)
}
