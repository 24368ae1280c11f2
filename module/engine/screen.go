// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/weirgate/weir/module/farm"
	"github.com/weirgate/weir/module/http1"
	"github.com/weirgate/weir/module/splice"
)

// This file is what a farm's configuration adds to the framing of requests:
// limits, and what is refused although its framing is certain.

// limits are the limits of what clients of a farm may send. The result is
// valid until the next call. Responses keep to the engine's own limits: a
// server is not bound by what its clients may do.
func (e *Engine) limits(farmID uint16) *http1.Limits {
	f := e.db.FarmByID(farmID)
	if f == nil {
		return &e.opt.Limits
	}
	if f != e.limitsOf {
		e.limitsOf, e.farmLimits = f, farmLimits(f, e.opt.Limits)
	}
	return &e.farmLimits
}

func farmLimits(f *farm.Farm, l http1.Limits) http1.Limits {
	if f.Limits.Head != 0 {
		l.Head = f.Limits.Head
	}
	if f.Limits.Fields != 0 {
		l.Fields = f.Limits.Fields
	}
	if f.Limits.Target != 0 {
		l.Target = f.Limits.Target
	}
	if f.Limits.ChunkExt != 0 {
		l.ChunkExt = f.Limits.ChunkExt
	}
	if f.Limits.Trailers != 0 {
		l.Trailers = f.Limits.Trailers
	}
	return l
}

// screen says why a request whose framing is certain is refused all the same,
// ReasonNone if it is not. The answer is 400, and the connection can be kept.
func (e *Engine) screen(r splice.Ref, f *farm.Farm, d *side) Reason {
	h := &d.req
	if f.RouteSafety == farm.RouteSafetyReject || f.RouteSafety == farm.RouteSafetyAuto && f.Selector.Load().HasRoutes() {
		// A fragment never belongs into a request (RFC 9112 section 3.2), and
		// servers disagree on whether the path ends there.
		if h.Fragment || unsafePath(h.Path.Of(d.held)) {
			return ReasonRouteUnsafe
		}
	}
	if f.Forwarded != farm.ForwardedNone && h.ForwardedMore && !f.Trusts(e.clients.Key(r).Src.Addr) {
		return ReasonForwardedFields // more than can be neutralised
	}
	return ReasonNone
}

// unsafePath reports whether a server may read a path as another one than the
// routes, which compare it raw: one with dot segments (also with parameters,
// which some servers cut off first), empty segments, backslashes, or a dot, a
// slash, a backslash or a NUL in percent-encoding.
func unsafePath(path []byte) bool {
	for i, c := range path {
		switch c {
		case '\\':
			return true
		case '%':
			if i+2 < len(path) {
				switch path[i+1] {
				case '2':
					if l := path[i+2] | 0x20; l == 'e' || l == 'f' {
						return true
					}
				case '5':
					if path[i+2]|0x20 == 'c' {
						return true
					}
				case '0':
					if path[i+2] == '0' {
						return true
					}
				}
			}
		case '/':
			if i+1 == len(path) {
				break
			}
			if path[i+1] == '/' {
				return true
			}
			k := i + 1
			for k < len(path) && k < i+3 && path[k] == '.' {
				k++
			}
			if k > i+1 && (k == len(path) || path[k] == '/' || path[k] == ';') {
				return true
			}
		}
	}
	return false
}
