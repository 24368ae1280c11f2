// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirgate/weir/module/config"
)

// maxBody bounds what a caller may send, bytes: the text of a configuration is
// the largest.
const maxBody = 16 << 20

// api serves version v1. What is served for an Operator alone is not there for
// a plain Provider.
type api struct {
	p      Provider
	op     Operator // nil: p is none
	ending <-chan struct{}
}

type handler func(w http.ResponseWriter, r *http.Request) error

// routes returns the handler of all paths. docs/control.md describes them.
func routes(p Provider, ending <-chan struct{}) http.Handler {
	a := &api{p: p, ending: ending}
	a.op, _ = p.(Operator)
	table := map[string]map[string]handler{
		"/v1/status": {http.MethodGet: a.status},
	}
	if a.op != nil {
		for path, methods := range map[string]map[string]handler{
			"/v1/farms":                         {http.MethodGet: a.farms},
			"/v1/farms/{farm}":                  {http.MethodGet: a.farm},
			"/v1/farms/{farm}/servers":          {http.MethodGet: a.servers, http.MethodPost: a.addServer},
			"/v1/farms/{farm}/servers/{server}": {http.MethodGet: a.server, http.MethodPatch: a.changeServer, http.MethodDelete: a.removeServer},
			"/v1/pools":                         {http.MethodGet: a.pools},
			"/v1/flows":                         {http.MethodGet: a.flows, http.MethodDelete: a.kill},
			"/v1/events":                        {http.MethodGet: a.events},
			"/v1/trace":                         {http.MethodGet: a.trace},
			"/v1/reload":                        {http.MethodPost: a.reload},
			"/v1/plan":                          {http.MethodPost: a.plan},
			"/v1/rules":                         {http.MethodGet: a.rules},
			"/v1/overrides":                     {http.MethodGet: a.overrides},
			"/v1/overrides/{farm}/{server}":     {http.MethodDelete: a.dropOverrides},
		} {
			table[path] = methods
		}
	}
	policyRoutes(table, p)
	mux := http.NewServeMux()
	for path, methods := range table {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			method := r.Method
			if method == http.MethodHead {
				method = http.MethodGet
			}
			h := methods[method]
			if h == nil {
				var allow []string
				for m := range methods {
					allow = append(allow, m)
				}
				if methods[http.MethodGet] != nil {
					allow = append(allow, http.MethodHead)
				}
				slices.Sort(allow)
				w.Header().Set("Allow", strings.Join(allow, ", "))
				answerError(w, http.StatusMethodNotAllowed, r.Method+" is not possible here; use "+strings.Join(allow, " or "))
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			if err := h(w, r); err != nil {
				fail(w, err)
			}
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answerError(w, http.StatusNotFound, "there is no "+r.URL.Path+" in this version of the control API")
	})
	return mux
}

// started is the error of a stream whose answer has begun: the code is out,
// and the missing end tells the reader.
type started struct{ error }

func fail(w http.ResponseWriter, err error) {
	var a *AnswerError
	var s started
	switch {
	case errors.As(err, &s):
	case errors.As(err, &a):
		answerError(w, a.Code, a.Msg)
	default:
		answerError(w, http.StatusInternalServerError, err.Error())
	}
}

func (a *api) status(w http.ResponseWriter, r *http.Request) error {
	st, err := a.p.Status(r.Context())
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, st)
	return nil
}

func (a *api) farms(w http.ResponseWriter, r *http.Request) error {
	st, err := a.p.Status(r.Context())
	if err != nil {
		return err
	}
	answer(w, http.StatusOK, st.Farms)
	return nil
}

func (a *api) findFarm(r *http.Request) (*Farm, error) {
	st, err := a.p.Status(r.Context())
	if err != nil {
		return nil, err
	}
	name := r.PathValue("farm")
	for i := range st.Farms {
		if st.Farms[i].Name == name {
			return &st.Farms[i], nil
		}
	}
	return nil, NotFound(fmt.Sprintf("there is no farm %q", name))
}

func (a *api) farm(w http.ResponseWriter, r *http.Request) error {
	f, err := a.findFarm(r)
	if err == nil {
		answer(w, http.StatusOK, f)
	}
	return err
}

func (a *api) servers(w http.ResponseWriter, r *http.Request) error {
	f, err := a.findFarm(r)
	if err == nil {
		answer(w, http.StatusOK, f.Servers)
	}
	return err
}

func (a *api) server(w http.ResponseWriter, r *http.Request) error {
	f, err := a.findFarm(r)
	if err != nil {
		return err
	}
	for i := range f.Servers {
		if f.Servers[i].Name == r.PathValue("server") {
			answer(w, http.StatusOK, f.Servers[i])
			return nil
		}
	}
	return NotFound(fmt.Sprintf("there is no server %q in farm %q", r.PathValue("server"), f.Name))
}

// body reads the JSON that a caller sent; what it does not know is refused.
func body(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return Invalid("the body is not the JSON that is expected here: " + err.Error())
	}
	return nil
}

func (a *api) changeServer(w http.ResponseWriter, r *http.Request) error {
	var c ServerChange
	if err := body(r, &c); err != nil {
		return err
	}
	o, err := a.op.ChangeServer(r.Context(), r.PathValue("farm"), r.PathValue("server"), c)
	if err == nil {
		answer(w, http.StatusOK, o)
	}
	return err
}

func (a *api) addServer(w http.ResponseWriter, r *http.Request) error {
	var s ServerSpec
	if err := body(r, &s); err != nil {
		return err
	}
	o, err := a.op.AddServer(r.Context(), r.PathValue("farm"), s)
	if err == nil {
		answer(w, http.StatusOK, o)
	}
	return err
}

func (a *api) removeServer(w http.ResponseWriter, r *http.Request) error {
	persist := r.URL.Query().Get("persist") == "true"
	o, err := a.op.RemoveServer(r.Context(), r.PathValue("farm"), r.PathValue("server"), persist)
	if err == nil {
		answer(w, http.StatusOK, o)
	}
	return err
}

func (a *api) overrides(w http.ResponseWriter, r *http.Request) error {
	list, err := a.op.Overrides(r.Context())
	if err == nil {
		answer(w, http.StatusOK, notNil(list))
	}
	return err
}

func (a *api) dropOverrides(w http.ResponseWriter, r *http.Request) error {
	n, err := a.op.DropOverrides(r.Context(), r.PathValue("farm"), r.PathValue("server"))
	if err == nil {
		answer(w, http.StatusOK, Count{n})
	}
	return err
}

// Count is the answer of what acts on several things.
type Count struct {
	Count int `json:"count"`
}

func notNil[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

func (a *api) pools(w http.ResponseWriter, r *http.Request) error {
	list, err := a.op.Pools(r.Context())
	if err == nil {
		answer(w, http.StatusOK, notNil(list))
	}
	return err
}

func (a *api) reload(w http.ResponseWriter, r *http.Request) error {
	res, err := a.op.Reload(r.Context())
	if err != nil {
		return err
	}
	code := http.StatusOK
	if res.Outcome == Refused {
		code = http.StatusUnprocessableEntity
	}
	res.Changes = notNil(res.Changes)
	answer(w, code, res)
	return nil
}

func (a *api) plan(w http.ResponseWriter, r *http.Request) error {
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return Invalid(err.Error())
	}
	res, err := a.op.Plan(r.Context(), text)
	var bad *config.Error
	if errors.As(err, &bad) {
		return Invalid(err.Error())
	}
	if err == nil {
		res.Changes = notNil(res.Changes)
		answer(w, http.StatusOK, res)
	}
	return err
}

func (a *api) rules(w http.ResponseWriter, r *http.Request) error {
	text, err := a.op.Rules(r.Context())
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, text) // The reader went away; nobody is left to tell.
	return nil
}

// ParseFlowFilter reads the query of /v1/flows: client, vip, farm, server,
// state, limit.
func ParseFlowFilter(get func(string) string) (f FlowFilter, err error) {
	if s := get("client"); s != "" {
		if f.Client, f.Port, err = ParseClient(s); err != nil {
			return f, err
		}
	}
	if s := get("vip"); s != "" {
		if f.VIP, err = netip.ParseAddrPort(s); err != nil {
			return f, Invalid(fmt.Sprintf("vip %q: expected ADDRESS:PORT", s))
		}
	}
	f.Farm, f.Server, f.State = get("farm"), get("server"), get("state")
	if f.State != "" && !slices.Contains(FlowStates[:], f.State) {
		return f, Invalid(fmt.Sprintf("state %q: expected one of %s", f.State, strings.Join(FlowStates[:], ", ")))
	}
	if s := get("limit"); s != "" {
		if f.Limit, err = strconv.Atoi(s); err != nil || f.Limit < 0 {
			return f, Invalid(fmt.Sprintf("limit %q: expected a number", s))
		}
	}
	return f, nil
}

// FlowStates are the words of Flow.State.
var FlowStates = [...]string{"head", "binding", "waiting", "spliced", "answering", "closing"}

// ParseClient reads ADDRESS, ADDRESS:PORT or NETWORK/BITS.
func ParseClient(s string) (p netip.Prefix, port uint16, err error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		a := ap.Addr().Unmap()
		return netip.PrefixFrom(a, a.BitLen()), ap.Port(), nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), 0, nil
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Masked(), 0, nil
	}
	return p, 0, Invalid(fmt.Sprintf("client %q: expected ADDRESS, ADDRESS:PORT or NETWORK/BITS", s))
}

// lines is an answer of one JSON value per line.
type lines struct {
	w     http.ResponseWriter
	b     *bufio.Writer
	flush func()
	begun bool
}

func newLines(w http.ResponseWriter) *lines {
	l := &lines{w: w, b: bufio.NewWriterSize(w, 64<<10), flush: func() {}}
	rc := http.NewResponseController(w)
	l.flush = func() { _ = rc.Flush() } // What cannot be flushed comes later.
	return l
}

func (l *lines) begin() {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/x-ndjson")
		l.w.WriteHeader(http.StatusOK)
	}
}

func (l *lines) line(b []byte) error {
	l.begin()
	if _, err := l.b.Write(b); err != nil {
		return err
	}
	return l.b.WriteByte('\n')
}

func (l *lines) value(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return l.line(b)
}

// push sends what was written so far.
func (l *lines) push() error {
	l.begin()
	if err := l.b.Flush(); err != nil {
		return err
	}
	l.flush()
	return nil
}

// end finishes the answer. An error after its beginning cuts the connection,
// so that the reader does not take a part for the whole.
func (l *lines) end(err error) error {
	if err == nil {
		if err = l.push(); err == nil {
			return nil
		}
	}
	if !l.begun {
		return err
	}
	panic(http.ErrAbortHandler)
}

func (a *api) flows(w http.ResponseWriter, r *http.Request) error {
	want, err := ParseFlowFilter(r.URL.Query().Get)
	if err != nil {
		return err
	}
	l := newLines(w)
	var b []byte
	return l.end(a.op.Flows(r.Context(), want, func(f *Flow) error {
		b = f.AppendJSON(b[:0])
		return l.line(b)
	}))
}

func (a *api) kill(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	client, err := netip.ParseAddrPort(q.Get("client"))
	if err != nil {
		return Invalid(fmt.Sprintf("client %q: expected ADDRESS:PORT", q.Get("client")))
	}
	var vip netip.AddrPort
	if s := q.Get("vip"); s != "" {
		if vip, err = netip.ParseAddrPort(s); err != nil {
			return Invalid(fmt.Sprintf("vip %q: expected ADDRESS:PORT", s))
		}
	}
	n, err := a.op.Kill(r.Context(), client, vip)
	if err != nil {
		return err
	}
	if n == 0 {
		return NotFound(fmt.Sprintf("there is no connection of %s", client))
	}
	answer(w, http.StatusOK, Count{n})
	return nil
}

// stream gives a context that ends with the request and with the instance.
func (a *api) stream(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	go func() {
		select {
		case <-a.ending:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// events answers what has been, and with follow=true what comes too. after=N
// begins behind that event, last=N with the last N.
func (a *api) events(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	ev := a.op.Events()
	number := func(key string) (uint64, bool, error) {
		s := q.Get(key)
		if s == "" {
			return 0, false, nil
		}
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, false, Invalid(fmt.Sprintf("%s %q: expected a number", key, s))
		}
		return n, true, nil
	}
	seq, after, err := number("after")
	if err != nil {
		return err
	}
	last, some, err := number("last")
	if err != nil {
		return err
	}
	if newest := ev.Last(); some && newest > last {
		seq = max(seq, newest-last)
	}
	ctx, cancel := a.stream(r)
	defer cancel()
	l := newLines(w)
	for first := true; ; first = false {
		list, lost, more := ev.After(seq)
		if lost > 0 && (!first || after) {
			if err := l.value(Event{Name: EventLost, Level: LevelWarn, Count: lost, Seq: seq + lost, Time: list[0].Time, Text: fmt.Sprintf("%d events were lost", lost)}); err != nil {
				return l.end(err)
			}
		}
		for i := range list {
			seq = list[i].Seq
			if err := l.value(&list[i]); err != nil {
				return l.end(err)
			}
		}
		if q.Get("follow") != "true" {
			return l.end(nil)
		}
		if err := l.push(); err != nil {
			return l.end(err)
		}
		select {
		case <-ctx.Done():
			return l.end(nil)
		case <-more:
		}
	}
}

func (a *api) trace(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	p, _, err := ParseClient(q.Get("client"))
	if err != nil {
		return err
	}
	want := TraceFilter{Client: p}
	if s := q.Get("snap"); s != "" {
		if want.Snap, err = strconv.Atoi(s); err != nil || want.Snap < 0 {
			return Invalid(fmt.Sprintf("snap %q: expected a number of bytes", s))
		}
	}
	ctx, cancel := a.stream(r)
	defer cancel()
	l := newLines(w)
	return l.end(a.op.Trace(ctx, want, func(t *TraceRecord) error {
		if err := l.value(t); err != nil {
			return err
		}
		return l.push()
	}))
}
