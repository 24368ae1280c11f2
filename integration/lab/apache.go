// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ApacheOptions says what an Apache httpd of the lab serves.
type ApacheOptions struct {
	Addrs []netip.AddrPort // where it listens; at least one
	Root  string           // the directory of the files that it serves
	// KeepAliveRequests is how many requests a connection may carry; 0 means
	// no limit.
	KeepAliveRequests int
	// Extra is added to the configuration as it is.
	Extra string
}

// An ApacheServer is a real Apache httpd that runs in a host, with the event
// MPM, a single child process and the files under Root.
type ApacheServer struct {
	Host *Host
	Root string
	Dir  string // its configuration and logs
	Proc *Process
}

// apacheModules are the places where distributions put httpd's modules.
var apacheModules = []string{"/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/usr/lib/httpd/modules"}

// Apache starts Apache httpd in the foreground inside the namespace and waits
// until it accepts connections.
func Apache(h *Host, o ApacheOptions) (*ApacheServer, error) {
	if len(o.Addrs) == 0 {
		return nil, errors.New("lab: Apache needs an address")
	}
	bin, err := FindTool("apache2")
	if err != nil {
		if bin, err = FindTool("httpd"); err != nil {
			return nil, fmt.Errorf("lab: neither apache2 nor httpd: %w", err)
		}
	}
	modules := ""
	for _, d := range apacheModules {
		if _, err := os.Stat(filepath.Join(d, "mod_mpm_event.so")); err == nil {
			modules = d
		}
	}
	if modules == "" {
		return nil, fmt.Errorf("lab: no mod_mpm_event.so in %s", strings.Join(apacheModules, ", "))
	}
	dir, err := h.lab.Subdir(h.name + "-apache-" + strconv.Itoa(int(o.Addrs[0].Port())))
	if err != nil {
		return nil, err
	}
	a := &ApacheServer{Host: h, Root: o.Root, Dir: dir}
	var listen strings.Builder
	for _, p := range o.Addrs {
		fmt.Fprintf(&listen, "Listen %s\n", p)
	}
	// It refuses to serve as root: 65534 is nobody, everywhere.
	conf := fmt.Sprintf(`ServerRoot %[1]s
LoadModule mpm_event_module %[2]s/mod_mpm_event.so
LoadModule authz_core_module %[2]s/mod_authz_core.so
PidFile %[1]s/apache.pid
Mutex posixsem
ErrorLog %[1]s/error.log
LogFormat "%%{remote}p\t%%k\t%%a\t%%m\t%%U\t%%>s\t%%B\t%%H" lab
CustomLog %[1]s/access.log lab
User #65534
Group #65534
ServerName lab
ListenBacklog 4096
StartServers 1
ServerLimit 1
ThreadLimit 64
ThreadsPerChild 64
MaxRequestWorkers 64
AsyncRequestWorkerFactor 64
MinSpareThreads 1
MaxSpareThreads 64
KeepAlive On
MaxKeepAliveRequests %[3]d
KeepAliveTimeout 3600
TimeOut 60
%[4]sDocumentRoot %[5]s
%[6]s
`, dir, modules, o.KeepAliveRequests, listen.String(), o.Root, o.Extra)
	file := filepath.Join(dir, "apache.conf")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, fmt.Errorf("lab: Apache: %w", err)
	}
	if a.Proc, err = h.Start(h.Command(bin, "-DFOREGROUND", "-d", dir, "-f", file)); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		c, err := h.Dial(ctx, "tcp", o.Addrs[0].String())
		if err == nil {
			return a, c.Close()
		}
		select {
		case <-a.Proc.Done():
			log, _ := os.ReadFile(filepath.Join(dir, "error.log"))
			return nil, fmt.Errorf("lab: host %s: Apache ended: %v: %s", h.name, a.Proc.Wait(), strings.TrimSpace(string(log)))
		case <-ctx.Done():
			return nil, fmt.Errorf("lab: host %s: Apache does not accept connections at %s: %w", h.name, o.Addrs[0], err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Accesses reads the access log. Apache has no serial numbers of connections:
// Connection is the peer's port, which a later connection may use again. Lines
// are written when the request is done with, which may be a moment after the
// client has its response.
func (a *ApacheServer) Accesses() ([]Access, error) {
	f, err := os.Open(filepath.Join(a.Dir, "access.log"))
	if err != nil {
		return nil, fmt.Errorf("lab: Apache of %s: %w", a.Host.name, err)
	}
	defer f.Close()
	var as []Access
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		f := strings.Split(sc.Text(), "\t")
		if len(f) != 8 {
			return nil, fmt.Errorf("lab: Apache of %s: access log, line %d: %q", a.Host.name, len(as)+1, sc.Text())
		}
		var x Access
		var errs [5]error
		x.Connection, errs[0] = strconv.Atoi(f[0])
		x.Request, errs[1] = strconv.Atoi(f[1])
		x.Request++ // %k counts the requests before this one
		addr, err := netip.ParseAddr(f[2])
		errs[2] = err
		x.Remote = netip.AddrPortFrom(addr, uint16(x.Connection))
		x.Method, x.Path, x.Protocol = f[3], f[4], f[7]
		x.Status, errs[3] = strconv.Atoi(f[5])
		x.BodyBytes, errs[4] = strconv.ParseInt(f[6], 10, 64)
		if err := errors.Join(errs[:]...); err != nil {
			return nil, fmt.Errorf("lab: Apache of %s: access log, line %d: %w", a.Host.name, len(as)+1, err)
		}
		as = append(as, x)
	}
	return as, sc.Err()
}

// Stop ends Apache.
func (a *ApacheServer) Stop() error { return a.Proc.Kill() }
