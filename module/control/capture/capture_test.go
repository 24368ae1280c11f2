// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirgate/weir/internal/require"
	"github.com/weirgate/weir/module/packet"
)

var (
	client = netip.MustParseAddrPort("198.18.0.11:40001")
	vip    = netip.MustParseAddrPort("203.0.113.10:80")
	snip   = netip.MustParseAddrPort("198.51.100.1:10240")
	server = netip.MustParseAddrPort("198.51.100.11:80")
)

func segment(src, dst netip.AddrPort, seq, ack packet.Seq, fl packet.Flags, data string) []byte {
	return packet.AppendSegment(nil, &packet.Segment{
		Src: packet.EndpointFrom(src), Dst: packet.EndpointFrom(dst), Seq: seq, Ack: ack, Flags: fl, Window: 1000,
	}, []byte(data))
}

// TestRoundTrip: what is written is read again, in every respect.
func TestRoundTrip(t *testing.T) {
	var file bytes.Buffer
	w, err := NewWriter(&file, "weir test", "client", "server")
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1700000000, 123456789)
	want := []Packet{
		{Time: at, Interface: 0, Data: segment(client, vip, 1, 2, packet.ACK, "GET / HTTP/1.1\r\n\r\n"), Comment: "accepted"},
		{Time: at.Add(time.Nanosecond), Interface: 1, Outgoing: true, Data: segment(snip, server, 3, 4, packet.ACK, "odd")},
	}
	for i := range want {
		if err := w.Write(&want[i]); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Clone(file.Bytes())
	r, err := NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		k, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !k.Time.Equal(want[i].Time) || k.Interface != want[i].Interface || k.Outgoing != want[i].Outgoing ||
			!bytes.Equal(k.Data, want[i].Data) || k.Comment != want[i].Comment || k.Len != len(want[i].Data) {
			t.Errorf("packet %d: got %+v, want %+v", i, k, want[i])
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("the end: %v", err)
	}
	// Cut off anywhere: an end or an error, never a wrong packet or a panic.
	for n := range whole {
		r, err := NewReader(bytes.NewReader(whole[:n]))
		for err == nil {
			_, err = r.Next()
		}
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFormat) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	// Other programs read it too.
	tcpdump, err := exec.LookPath("tcpdump")
	if err != nil {
		return
	}
	path := filepath.Join(t.TempDir(), "x.pcapng")
	if err := os.WriteFile(path, whole, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tcpdump, "-nr", path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "203.0.113.10.80") || !strings.Contains(string(out), "198.51.100.11.80") {
		t.Errorf("tcpdump: %v\n%s", err, out)
	}
}

// TestTshark opens a file in Wireshark's own reader.
func TestTshark(t *testing.T) {
	tshark := require.Tool(t, "tshark")
	path := filepath.Join(t.TempDir(), "x.pcapng")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(f, "weir test", "client", "server")
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range [][]byte{segment(client, vip, 1, 2, packet.ACK, "GET / HTTP/1.1\r\n\r\n"), segment(snip, server, 3, 4, packet.ACK, "x")} {
		if err := w.Write(&Packet{Time: time.Now(), Interface: i, Data: b, Comment: "note"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tshark, "-nr", path, "-T", "fields", "-e", "frame.interface_name", "-e", "ip.dst", "-e", "frame.comment").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "client\t203.0.113.10\tnote") || !strings.Contains(string(out), "server\t198.51.100.11\tnote") {
		t.Errorf("tshark: %v\n%s", err, out)
	}
}

// TestOldFormat reads pcap in both byte orders and with link headers.
func TestOldFormat(t *testing.T) {
	ip := segment(client, vip, 1, 2, packet.ACK, "")
	ether := append(append(make([]byte, 12), 0x08, 0x00), ip...)
	vlan := append(append(make([]byte, 12), 0x81, 0x00, 0, 5, 0x08, 0x00), ip...)
	arp := append(append(make([]byte, 12), 0x08, 0x06), make([]byte, 28)...)
	for _, order := range []binary.AppendByteOrder{binary.LittleEndian, binary.BigEndian} {
		var b []byte
		for _, v := range []uint32{magicMicro, 2 | 4<<16, 0, 0, 65535, linkEthernet} {
			b = order.AppendUint32(b, v)
		}
		for i, frame := range [][]byte{ether, arp, vlan} {
			for _, v := range []uint32{uint32(100 + i), 7, uint32(len(frame)), uint32(len(frame))} {
				b = order.AppendUint32(b, v)
			}
			b = append(b, frame...)
		}
		r, err := NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		for _, sec := range []int64{100, 102} {
			k, err := r.Next()
			if err != nil || !bytes.Equal(k.Data, ip) || !k.Time.Equal(time.Unix(sec, 7000)) {
				t.Errorf("%v: %+v, %v", order, k, err)
			}
		}
		if _, err := r.Next(); err != io.EOF || r.Skipped != 1 {
			t.Errorf("%v: %v, %d skipped", order, err, r.Skipped)
		}
	}
	for _, bad := range []string{"", "short", strings.Repeat("x", 100)} {
		if _, err := NewReader(strings.NewReader(bad)); !errors.Is(err, ErrFormat) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestNotation(t *testing.T) {
	for _, c := range []struct {
		fl   packet.Flags
		data string
		want string
	}{
		{packet.SYN, "", "SYN:100(0)"},
		{packet.SYN | packet.ACK, "", "SYN ACK:100,200(0)"},
		{packet.ACK, "", "ACK:100,200(0)"},
		{packet.ACK | packet.PSH, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n", "GET:100,200(28)"},
		{packet.ACK, "HTTP/1.1 200 OK\r\n", "RESP:100,200(17)"},
		{packet.ACK | packet.FIN, "HTTP/1.1 200 OK\r\n", "RESP FIN:100,200(17)"},
		{packet.ACK, "more", "DATA:100,200(4)"},
		{packet.ACK, "NOT A REQUEST\r\n", "DATA:100,200(15)"},
		{packet.ACK | packet.FIN, "", "FIN:100,200(0)"},
		{packet.RST | packet.ACK, "", "RST:100,200(0)"},
	} {
		b := segment(client, vip, 100, 200, c.fl, c.data)
		if got := Segment(b); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
		if got := Segment(b[:min(len(b), 54)]); !strings.HasSuffix(got, c.want[strings.LastIndex(c.want, "("):]) {
			t.Errorf("cut off: got %s, want the length of %s", got, c.want)
		}
	}
	if got := Segment([]byte{1, 2}); strings.Contains(got, ":") {
		t.Errorf("no packet: %s", got)
	}
}

// TestSteps: translations are paired, answers of our own stand alone.
func TestSteps(t *testing.T) {
	s := &Sides{SNIPs: []netip.Addr{snip.Addr()}, PortFirst: 10240, PortLast: 32767}
	get := segment(client, vip, 1, 2, packet.ACK, "GET / HTTP/1.1\r\n\r\n")
	on := segment(snip, server, 500, 600, packet.ACK, "GET / HTTP/1.1\r\n\r\n")
	ack := segment(vip, client, 2, 19, packet.ACK, "")
	for _, c := range []struct {
		in   []byte
		out  [][]byte
		want []string
	}{
		{get, [][]byte{on}, []string{"GET:1,2(18) -> GET:500,600(18)"}},
		{get, [][]byte{ack, on}, []string{"GET:1,2(18) -> GET:500,600(18)", "ACK:2,19(0) <-"}},
		{get, nil, []string{"GET:1,2(18) ->"}},
		{get, [][]byte{segment(snip, server, 7, 0, packet.SYN, "")}, []string{"GET:1,2(18) ->", "-> SYN:7(0)"}},
		{nil, [][]byte{ack}, []string{"ACK:2,19(0) <-"}},
		{segment(server, snip, 600, 518, packet.ACK, "HTTP/1.1 200 OK"), [][]byte{segment(vip, client, 2, 19, packet.ACK, "HTTP/1.1 200 OK")}, []string{"RESP:2,19(15) <- RESP:600,518(15)"}},
		{segment(server, snip, 600, 518, packet.ACK, ""), nil, []string{"<- ACK:600,518(0)"}},
	} {
		var got []string
		for _, st := range s.Steps(c.in, c.out) {
			got = append(got, strings.Join(strings.Fields(st.String()), " "))
		}
		if strings.Join(got, "\n") != strings.Join(c.want, "\n") {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}
