// SPDX-License-Identifier: Apache-2.0

package farm

import (
	"net/netip"

	"github.com/weirgate/weir/module/packet"
	"github.com/weirgate/weir/policies/snapshot"
)

// Numbers say which IDs stand for which farms and servers: what flow records
// mean by them. A process leaves them to its successor, with the terms that
// exchanges of farms go by which the successor's Spec may not have.
type Numbers struct {
	Farms      []Numbered `json:"farms"`
	NextFarm   uint16     `json:"next_farm"`
	NextServer uint16     `json:"next_server"`
}

// Numbered is one farm with its servers.
type Numbered struct {
	ID      uint16           `json:"id"`
	Name    string           `json:"name"`
	Terms   Terms            `json:"terms"`
	Servers []NumberedServer `json:"servers"`
}

// Terms are what exchanges that run go by, besides their servers.
type Terms struct {
	Pool           PoolLimits
	Timeouts       Timeouts
	Limits         Limits
	Forwarded      ForwardedMode
	ForwardedTrust []netip.Prefix `json:",omitempty"`
	RouteSafety    RouteSafety
}

// NumberedServer is one server.
type NumberedServer struct {
	ID      uint16         `json:"id"`
	Name    string         `json:"name"`
	Address netip.AddrPort `json:"address"`
}

// Numbers returns the IDs of all farms and servers, removed ones too.
func (db *DB) Numbers() Numbers {
	n := Numbers{NextFarm: db.nextFarm, NextServer: db.nextServer}
	at := map[uint16]int{}
	for _, f := range db.farms {
		if f != nil {
			at[f.ID] = len(n.Farms)
			n.Farms = append(n.Farms, Numbered{ID: f.ID, Name: f.Name, Servers: []NumberedServer{}, Terms: Terms{
				f.Pool, f.Timeouts, f.Limits, f.Forwarded, f.ForwardedTrust, f.RouteSafety,
			}})
		}
	}
	for _, s := range db.servers {
		if s == nil {
			continue
		}
		if i, ok := at[s.Farm.ID]; ok {
			n.Farms[i].Servers = append(n.Farms[i].Servers, NumberedServer{
				ID: s.ID, Name: s.Name, Address: netip.AddrPortFrom(s.Endpoint.Addr.Netip(), s.Endpoint.Port),
			})
		}
	}
	return n
}

// Recall makes the generation from which Build goes on with the numbers of
// another process: every farm and server in it counts as removed until a Spec
// names it again, and goes by the terms that it had. Numbers that contradict
// themselves are left out.
func Recall(n Numbers) *DB {
	db := &DB{nextFarm: n.NextFarm, nextServer: n.NextServer}
	farms, servers := map[uint16]*Farm{}, map[uint16]*Server{}
	names := map[string]bool{}
	for _, x := range n.Farms {
		if x.ID == 0 || x.Name == "" || farms[x.ID] != nil || names[x.Name] {
			continue
		}
		names[x.Name] = true
		f := &Farm{
			ID: x.ID, Name: x.Name, Removed: true, Stats: new(FarmStats),
			Pool: x.Terms.Pool, Timeouts: x.Terms.Timeouts, Limits: x.Terms.Limits,
			Forwarded: x.Terms.Forwarded, ForwardedTrust: x.Terms.ForwardedTrust, RouteSafety: x.Terms.RouteSafety,
		}
		if !f.Timeouts.known() {
			f.Timeouts = DefaultTimeouts // of a program that left none
		}
		for _, y := range x.Servers {
			if y.ID == 0 || servers[y.ID] != nil || !y.Address.IsValid() {
				continue
			}
			s := &Server{
				ID: y.ID, Index: NoIndex, Name: y.Name, Farm: f, Endpoint: packet.EndpointFrom(y.Address), Weight: 1,
				Live: new(snapshot.Live), Stats: new(ServerStats),
			}
			servers[y.ID] = s
		}
		sel, err := snapshot.NewSelector(nil, nil)
		if err != nil || f.SetSelector(sel) != nil {
			continue
		}
		farms[x.ID] = f
	}
	for id, s := range servers {
		if farms[s.Farm.ID] == nil {
			delete(servers, id)
		}
	}
	db.index(farms, servers)
	return db
}
