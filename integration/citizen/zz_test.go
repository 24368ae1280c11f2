package citizen

import (
	"fmt"
	"strings"
	"testing"
		"github.com/weirgate/weir/integration/lab"
	"github.com/weirgate/weir/integration/lab/ladder"
)

func TestZZ(t *testing.T) {
	r := newRig(t, lab.FarmOptions{Clients: 1, Servers: 1, NoIPv6: true})
	if _, err := lab.HTTPServer(r.Router, "198.18.0.1:8080", handler("s1")); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.HTTPServer(r.Router, "198.51.100.1:8081", handler("s2")); err != nil {
		t.Fatal(err)
	}
	w := r.startWith(r.custom([]string{r.VIP().String()}, []string{"198.18.0.1:8080", "198.51.100.1:8081"}, ""))
	c, err := r.Router.CaptureOn(lab.CaptureOptions{SnapLen: 120}, "lo", r.ClientLeg)
	if err != nil { t.Fatal(err) }
	for _, e := range load(r.Clients[0], 500, r.VIP()) { t.Log(e) }
	recs, _ := c.Stop()
	var b strings.Builder
	for _, rec := range recs {
		s, err := ladder.Decode(rec.Data)
		if err != nil { continue }
		fmt.Fprintf(&b, "%s %s out=%v %v > %v %#02x seq %d ack %d len %d win %d nock=%v\n", rec.Time.Format("05.000000"), rec.Iface, rec.Outgoing, s.Src, s.Dst, s.Flags, s.Seq, s.Ack, s.Len, s.Window, rec.NoChecksum)
	}
	t.Log(b.String())
	_ = w
	fmt.Println(r.shell("cat /proc/net/netfilter/nfnetlink_queue; nft list counters"))
}
