// SPDX-License-Identifier: Apache-2.0

package policies

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirgate/weir/policies/policypb"
	"github.com/weirgate/weir/policies/snapshot"
)

// CapabilityAsk is the capability to be asked about single requests.
const CapabilityAsk = "ask"

// AskKey says what a plugin wants to know of a request.
type AskKey = snapshot.AskKey

// Field is a header field or a cookie.
type Field = snapshot.Field

// Decider is what a Policy has that wants to be asked about requests, beside
// Plugin.Ask. Such a plugin slows clients down: what a snapshot can say should
// be in one.
type Decider interface {
	// Decide says what to do with requests of this kind; nil says that the
	// plugin does not mind, and so does an error, which is logged. It is called
	// from many goroutines at the same time, also beside Tick, but never beside
	// Configure. An answer that takes longer than the deadline, 5 ms by
	// default, is not used.
	Decide(farm Farm, q *Question) (*Answer, error)
}

// Question is one kind of requests.
type Question struct {
	snapshot.Key // what Plugin.Ask names

	Attempt int      // 1, or more after a server failed
	Tried   []string // the servers where the request has been
}

// Header returns the value of a header field that Plugin.Ask names, "" if the
// request has none. Case does not matter.
func (q *Question) Header(name string) string {
	for i := range q.Fields {
		if f := &q.Fields[i]; !f.Field.Cookie && strings.EqualFold(f.Field.Name, name) {
			return f.Value
		}
	}
	return ""
}

// Cookie returns the value of a cookie that Plugin.Ask names, "" if the request
// has none.
func (q *Question) Cookie(name string) string {
	for i := range q.Fields {
		if f := &q.Fields[i]; f.Field.Cookie && f.Field.Name == name {
			return f.Value
		}
	}
	return ""
}

// Answer says what to do, by at most one of Servers, Reject and Redirect.
type Answer struct {
	Servers    []string           // it goes to one of these
	Scores     map[string]float64 // how good some of Servers are, as in Scores
	Reject     uint16             // a status, 400 to 599
	RetryAfter uint32             // seconds, with Reject; 0: no such field
	Redirect   uint16             // 302, 307 or 308
	Location   string             // with Redirect

	TTL  time.Duration // how long it holds for equal questions; 0: for this one
	Mark uint32        // for the connection's packets; 0: none
	Ban  time.Duration // how long to keep the client away; 0: not at all
}

// AskKeyToProto returns the message of a key.
func AskKeyToProto(k *AskKey) *policypb.AskKey {
	if k == nil {
		return nil
	}
	p := &policypb.AskKey{
		Method: k.Method, Host: k.Host, Path: k.Path, PathSegments: uint32(k.Segments),
		Client: k.Client, ClientBits4: uint32(k.Bits4), ClientBits6: uint32(k.Bits6),
	}
	for _, f := range k.Fields {
		p.Fields = append(p.Fields, &policypb.Field{Name: f.Name, Cookie: f.Cookie})
	}
	return p
}

// AskKeyFromProto returns the key of a message, or what is wrong with it.
func AskKeyFromProto(p *policypb.AskKey) (*AskKey, error) {
	if p.GetPathSegments() > math.MaxUint8 || p.GetClientBits4() > 32 || p.GetClientBits6() > 128 {
		return nil, fmt.Errorf("asks for %d segments of the path, %d bits of an IPv4 and %d of an IPv6 address", p.GetPathSegments(), p.GetClientBits4(), p.GetClientBits6())
	}
	k := &AskKey{
		Method: p.GetMethod(), Host: p.GetHost(), Path: p.GetPath(), Segments: uint8(p.GetPathSegments()),
		Client: p.GetClient(), Bits4: uint8(p.GetClientBits4()), Bits6: uint8(p.GetClientBits6()),
	}
	for _, f := range p.GetFields() {
		f := Field{Name: f.GetName(), Cookie: f.GetCookie()}
		if err := snapshot.CheckField(f); err != nil {
			return nil, fmt.Errorf("asks for %w", err)
		}
		k.Fields = append(k.Fields, f)
	}
	return k, nil
}

// QuestionToProto returns the message of a question.
func QuestionToProto(farm string, q *Question) *policypb.DecideRequest {
	p := &policypb.DecideRequest{Farm: farm, Method: q.Method, Host: q.Host, Path: q.Path, Attempt: uint32(q.Attempt), Tried: q.Tried}
	for _, f := range q.Fields {
		p.Fields = append(p.Fields, &policypb.FieldValue{
			Field: &policypb.Field{Name: f.Field.Name, Cookie: f.Field.Cookie}, Value: []byte(f.Value), Present: f.Present,
		})
	}
	if q.Client.IsValid() {
		if p.Client = q.Client.String(); q.Client.IsSingleIP() {
			p.Client = q.Client.Addr().String()
		}
	}
	return p
}

func questionFromProto(p *policypb.DecideRequest) *Question {
	q := &Question{Key: snapshot.Key{Method: p.GetMethod(), Host: p.GetHost(), Path: p.GetPath()}, Attempt: int(p.GetAttempt()), Tried: p.GetTried()}
	for _, f := range p.GetFields() {
		q.Fields = append(q.Fields, snapshot.KeyField{
			Field: Field{Name: f.GetField().GetName(), Cookie: f.GetField().GetCookie()}, Value: string(f.GetValue()), Present: f.GetPresent(),
		})
	}
	if a, err := netip.ParseAddr(p.GetClient()); err == nil {
		q.Client = netip.PrefixFrom(a, a.BitLen())
	} else if n, err := netip.ParsePrefix(p.GetClient()); err == nil {
		q.Client = n
	}
	return q
}

// answerToProto returns the message of an answer, or what is wrong with it.
func answerToProto(farm *Farm, a *Answer) (*policypb.DecideResponse, error) {
	p := &policypb.DecideResponse{}
	if a == nil {
		return p, nil
	}
	kinds := 0
	if len(a.Servers) > 0 {
		kinds++
		c := &policypb.ServerChoice{}
		for _, s := range a.Servers {
			if !farm.Has(s) {
				return nil, fmt.Errorf("answers with server %q, which is not in farm %q", s, farm.Name)
			}
			c.Servers = append(c.Servers, &policypb.ServerScore{Server: s, Score: a.Scores[s]})
		}
		p.Answer = &policypb.DecideResponse_Servers{Servers: c}
	}
	if a.Reject != 0 {
		kinds++
		p.Answer = &policypb.DecideResponse_Reject{Reject: &policypb.Reject{Status: uint32(a.Reject), RetryAfter: a.RetryAfter}}
	}
	if a.Redirect != 0 {
		kinds++
		p.Answer = &policypb.DecideResponse_Redirect{Redirect: &policypb.Redirect{Status: uint32(a.Redirect), Location: a.Location}}
	}
	if kinds > 1 {
		return nil, errors.New("answers with more than one of servers, reject and redirect")
	}
	p.Mark = a.Mark
	p.TtlMs = uint64(max(a.TTL, 0) / time.Millisecond)
	p.BanSeconds = uint32(min(max(a.Ban, 0)/time.Second, math.MaxUint32))
	return p, nil
}

// AnswerFromProto returns the answer of a message, and how long it holds.
func AnswerFromProto(p *policypb.DecideResponse) (*snapshot.Answer, time.Duration, error) {
	a := &snapshot.Answer{Mark: p.GetMark(), Ban: p.GetBanSeconds()}
	switch v := p.GetAnswer().(type) {
	case *policypb.DecideResponse_Servers:
		for _, s := range v.Servers.GetServers() {
			a.Servers = append(a.Servers, Score{Server: s.GetServer(), Score: s.GetScore()})
		}
		if len(a.Servers) == 0 {
			return nil, 0, errors.New("answers with no servers at all")
		}
	case *policypb.DecideResponse_Reject:
		if st := v.Reject.GetStatus(); st < 400 || st > 599 {
			return nil, 0, fmt.Errorf("rejects with status %d, which is not within 400 to 599", st)
		}
		a.Reject, a.RetryAfter = uint16(v.Reject.GetStatus()), v.Reject.GetRetryAfter()
	case *policypb.DecideResponse_Redirect:
		if st := v.Redirect.GetStatus(); st < 300 || st > 399 {
			return nil, 0, fmt.Errorf("redirects with status %d", st)
		}
		a.Redirect, a.Location = uint16(v.Redirect.GetStatus()), v.Redirect.GetLocation()
	}
	const longest = 24 * time.Hour
	ttl := longest
	if ms := p.GetTtlMs(); ms < uint64(longest/time.Millisecond) {
		ttl = time.Duration(ms) * time.Millisecond
	}
	return a, ttl, nil
}

// Decide is the service Ask.
func (s *server) Decide(_ context.Context, r *policypb.DecideRequest) (*policypb.DecideResponse, error) {
	s.mu.Lock()
	in := s.farms[r.GetFarm()]
	s.mu.Unlock()
	if in == nil {
		return nil, status.Errorf(codes.NotFound, "farm %q was not configured", r.GetFarm())
	}
	in.use.RLock()
	defer in.use.RUnlock()
	d, ok := in.policy.(Decider)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this plugin decides nothing")
	}
	a, err := d.Decide(cloneFarm(in.farm), questionFromProto(r))
	if err != nil {
		return nil, status.Error(codes.Unknown, err.Error())
	}
	p, err := answerToProto(&in.farm, a)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return p, nil
}
