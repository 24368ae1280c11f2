// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirgate/weir/module/control"
	"github.com/weirgate/weir/module/control/capture"
)

// errEnough ends a stream that has brought what was asked for.
var errEnough = errors.New("enough")

func (a *app) traceCommand() *cobra.Command {
	var q inquiry
	var client, file string
	var count, snap int
	cmd := &cobra.Command{
		Use:   "trace --client CLIENT",
		Short: "Watch the packets of a client on both sides of the translation",
		Long: "trace writes every packet of a client in the notation of the patent, TYPE:sequence,acknowledgment(length): the client's leg on the left, the server's on the right, " +
			"with the reasons that the engine counted. --pcap keeps the packets of both legs in a file for Wireshark, with the reasons as comments. " +
			"Packets are seen as the engine gets and makes them: checksums may be unfinished, and a packet may be larger than the link's MTU.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if client == "" {
				return errors.New("--client is missing: expected ADDRESS or NETWORK/BITS")
			}
			p, port, err := control.ParseClient(client)
			if err != nil {
				return fmt.Errorf("--%w", err)
			}
			return a.ask(cmd, &q, func(ctx context.Context, c *control.Client) (err error) {
				t := &tracer{a: a, json: q.output == "json", port: port, left: count}
				if file != "" {
					closeFile, err := t.keep(file)
					if err != nil {
						return err
					}
					defer func() {
						if e := closeFile(); err == nil {
							err = e
						}
					}()
				}
				err = c.Trace(ctx, control.TraceFilter{Client: p, Snap: snap}, t.record)
				if errors.Is(err, errEnough) {
					err = nil
				}
				return err
			})
		},
	}
	a.inquiryFlags(cmd, &q, "table", "json")
	f := cmd.Flags()
	f.StringVar(&client, "client", "", "the `CLIENT` to watch: ADDRESS, ADDRESS:PORT or NETWORK/BITS")
	f.IntVar(&count, "count", 0, "end after so many steps of the engine; 0: when interrupted")
	f.StringVar(&file, "pcap", "", "keep the packets in this pcapng `FILE`")
	f.IntVar(&snap, "snap", 0, "keep only so many bytes of each packet; 0: all")
	return cmd
}

// tracer writes the records of a trace.
type tracer struct {
	a     *app
	json  bool
	port  uint16 // of the client, 0: all
	left  int    // records to come, 0 at the beginning: no end
	sides capture.Sides
	file  *capture.Writer
	began time.Time
}

// keep opens the file for packets.
func (t *tracer) keep(name string) (closeFile func() error, err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	b := bufio.NewWriter(f)
	if t.file, err = capture.NewWriter(b, "weir "+Version(), "client side", "server side"); err != nil {
		_ = f.Close() // The first error says what is wrong.
		return nil, err
	}
	return func() error { return errors.Join(b.Flush(), f.Close()) }, nil
}

func (t *tracer) record(r *control.TraceRecord) error {
	if r.SNIPs != nil {
		t.sides.SNIPs = r.SNIPs
		if len(r.SNIPPorts) == 2 {
			t.sides.PortFirst, t.sides.PortLast = r.SNIPPorts[0], r.SNIPPorts[1]
		}
		if t.json {
			return nil
		}
		_, err := fmt.Fprintf(t.a.out, "%12s  %-22s  %-34s    %-34s  %s\n", "SECONDS", "CLIENT", "CLIENT SIDE", "SERVER SIDE", "SERVER")
		return err
	}
	var out [][]byte
	for _, b := range r.Out {
		out = append(out, b)
	}
	steps := t.sides.Steps(r.In, out)
	if t.port != 0 && !ofPort(steps, t.port) {
		return nil
	}
	if t.began.IsZero() {
		t.began = r.Time
	}
	if err := t.print(r, steps); err != nil {
		return err
	}
	if t.file != nil {
		if err := t.write(r, out); err != nil {
			return err
		}
	}
	if t.left > 0 {
		if t.left--; t.left == 0 {
			return errEnough
		}
	}
	return nil
}

// ofPort reports whether a step may be of a client's port: what is only on the
// server's leg is not known to be another's.
func ofPort(steps []capture.Step, port uint16) bool {
	known := false
	for i := range steps {
		if steps[i].ClientEnd.IsValid() {
			known = true
			if steps[i].ClientEnd.Port() == port {
				return true
			}
		}
	}
	return !known
}

func (t *tracer) print(r *control.TraceRecord, steps []capture.Step) error {
	if t.json {
		return t.a.asJSON(r)
	}
	if r.Lost > 0 {
		if _, err := fmt.Fprintf(t.a.out, "%s were lost: the terminal or the disk is too slow\n", plural(int(r.Lost), "step")); err != nil {
			return err
		}
	}
	for i := range steps {
		st := &steps[i]
		at, why := "", ""
		if i == 0 {
			at = fmt.Sprintf("%.6f", r.Time.Sub(t.began).Seconds())
			why = strings.Join(r.Reasons, " ")
		}
		server := ""
		if st.ServerEnd.IsValid() {
			server = st.ServerEnd.String() + " from " + fmt.Sprint(st.SNIP.Port())
			if r.Server != "" && i == 0 {
				server = r.Server + " " + server
			}
		}
		line := fmt.Sprintf("%12s  %-22s  %s", at, endpoint(st.ClientEnd), pad(st.String(), 72))
		if server != "" {
			line += "  " + server
		}
		if why != "" {
			line += "  [" + why + "]"
		}
		if _, err := fmt.Fprintln(t.a.out, strings.TrimRight(line, " ")); err != nil {
			return err
		}
	}
	return nil
}

func pad(s string, n int) string { return fmt.Sprintf("%-*s", n, s) }

func endpoint(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// write keeps the packets, in the order in which they passed.
func (t *tracer) write(r *control.TraceRecord, out [][]byte) error {
	put := func(b []byte, outgoing bool, note string) error {
		k := capture.Packet{Time: r.Time, Outgoing: outgoing, Data: b, Comment: note}
		if t.sides.ServerLeg(b, outgoing) {
			k.Interface = 1
		}
		return t.file.Write(&k)
	}
	if r.In != nil {
		if err := put(r.In, false, strings.Join(r.Reasons, " ")); err != nil {
			return err
		}
	}
	for _, b := range out {
		if err := put(b, true, ""); err != nil {
			return err
		}
	}
	return nil
}
