// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"encoding/binary"
	"net/netip"

	"github.com/weirgate/weir/module/engine"
	"github.com/weirgate/weir/module/packet"
)

// cookies are the engine's real ones, or ones with chosen numbers.
func (w *World) cookies() engine.Cookies {
	if len(w.Scenario.EngineToClient) == 0 {
		var secret [16]byte
		binary.LittleEndian.PutUint64(secret[:], w.Scenario.Seed)
		return engine.NewMACCookies(secret)
	}
	return &chosen{isses: w.Scenario.EngineToClient, opts: map[packet.Tuple]answered{}}
}

// chosen are cookies that remember instead of computing.
type chosen struct {
	isses []uint32
	n     int
	opts  map[packet.Tuple]answered
}

type answered struct {
	isn, iss packet.Seq
	opt      uint8
}

// Make implements engine.Cookies.
func (c *chosen) Make(t packet.Tuple, isn packet.Seq, opt uint8, _ int64) packet.Seq {
	if a, ok := c.opts[t]; ok && a.isn == isn {
		return a.iss
	}
	iss := packet.Seq(c.isses[c.n%len(c.isses)])
	c.n++
	c.opts[t] = answered{isn, iss, opt}
	return iss
}

// Check implements engine.Cookies.
func (c *chosen) Check(t packet.Tuple, isn, iss packet.Seq, _ int64) (uint8, bool) {
	a, ok := c.opts[t]
	return a.opt, ok && a.isn == isn && a.iss == iss
}

// clientEnd is the end of client connection i. Connections that follow another
// one take its end.
func (w *World) clientEnd(i int) netip.AddrPort {
	p := &w.Scenario.Conns[i]
	if p.After != 0 {
		return w.clients[p.After-1].local.AddrPort()
	}
	port := p.Port
	if port == 0 {
		port = uint16(40001 + i)
	}
	return netip.AddrPortFrom(clientAddr(w.Scenario.V6, p.Host), port)
}
