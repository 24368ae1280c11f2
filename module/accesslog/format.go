// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"strconv"
	"time"

	"github.com/weirgate/weir/module/engine"
)

// Names gives the names of a farm and a server by their IDs, empty ones if they
// are not known any more.
type Names func(farm, server uint16) (farmName, serverName string)

const hex = "0123456789abcdef"

// appendCommon writes a line in the Common Log Format: host, identity and user
// (unknown), time, request line, status, bytes. A status of 000 means that no
// response came; a target that was cut ends in three dots.
func appendCommon(b []byte, a *engine.AccessRecord) []byte {
	b = a.Client.Addr.Netip().AppendTo(b)
	b = append(b, " - - ["...)
	b = time.Unix(0, a.Started).AppendFormat(b, "02/Jan/2006:15:04:05 -0700")
	b = append(b, "] \""...)
	if m := a.Method(); len(m) > 0 {
		b = appendEscaped(b, m)
		b = append(b, ' ')
		t, cut := a.Target()
		b = appendEscaped(b, t)
		if cut {
			b = append(b, "..."...)
		}
		b = append(b, " HTTP/1."...)
		b = append(b, '0'+a.Minor)
	} else {
		b = append(b, '-')
	}
	b = append(b, "\" "...)
	if a.Status == 0 {
		b = append(b, "000"...)
	} else {
		b = strconv.AppendUint(b, uint64(a.Status), 10)
	}
	b = append(b, ' ')
	b = strconv.AppendUint(b, a.Out, 10)
	return append(b, '\n')
}

// appendEscaped writes bytes of a stranger into a quoted text, as Apache and
// nginx do: what is not printable ASCII, the quote and the backslash become
// \xHH, so that nobody forges a line or moves a terminal's cursor.
func appendEscaped(b, s []byte) []byte {
	for _, c := range s {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			b = append(b, '\\', 'x', hex[c>>4], hex[c&15])
		} else {
			b = append(b, c)
		}
	}
	return b
}

// appendJSON writes a line with one object. Times are microseconds.
func appendJSON(b []byte, a *engine.AccessRecord, names Names) []byte {
	farm, server := names(a.Farm, a.Server)
	b = append(b, `{"time":"`...)
	b = time.Unix(0, a.Started).UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	b = append(b, `","client":"`...)
	b = a.Client.AddrPort().AppendTo(b)
	b = append(b, `","vip":"`...)
	b = a.VIP.AddrPort().AppendTo(b)
	b = append(b, '"')
	b = appendText(b, "farm", farm)
	b = appendText(b, "server", server)
	b = append(b, `,"method":"`...)
	b = appendJSONBytes(b, a.Method())
	b = append(b, `","target":"`...)
	t, cut := a.Target()
	b = appendJSONBytes(b, t)
	b = append(b, '"')
	if cut {
		b = append(b, `,"target_cut":true`...)
	}
	b = append(b, `,"version":"HTTP/1.`...)
	b = append(b, '0'+a.Minor, '"')
	b = appendNumber(b, "status", int64(a.Status))
	b = appendText(b, "end", a.End.String())
	b = appendNumber(b, "bytes_in", int64(a.In))
	b = appendNumber(b, "bytes_out", int64(a.Out))
	b = appendSpan(b, "head_us", a.Started, a.Head)
	b = appendSpan(b, "bind_us", a.Head, a.Bound)
	b = appendSpan(b, "first_byte_us", a.Head, a.First)
	b = appendSpan(b, "total_us", a.Started, a.Ended)
	b = appendNumber(b, "attempts", int64(a.Attempts))
	b = append(b, `,"reused":`...)
	b = strconv.AppendBool(b, a.Reused)
	return append(b, "}\n"...)
}

func appendText(b []byte, key, value string) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, `":"`...)
	b = appendJSONBytes(b, []byte(value))
	return append(b, '"')
}

func appendNumber(b []byte, key string, n int64) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, `":`...)
	return strconv.AppendInt(b, n, 10)
}

// appendSpan writes the time between two moments, if both came.
func appendSpan(b []byte, key string, from, to int64) []byte {
	if from == 0 || to == 0 {
		return b
	}
	return appendNumber(b, key, max(to-from, 0)/1000)
}

// appendJSONBytes writes bytes of a stranger into a JSON string. A byte that is
// not printable ASCII becomes the character of its number.
func appendJSONBytes(b, s []byte) []byte {
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < ' ' || c > '~':
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			b = append(b, c)
		}
	}
	return b
}
