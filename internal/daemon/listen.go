// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/migrated-vm/migrated/internal/systemd"
	"github.com/migrated-vm/migrated/pkg/pagelane"
)

// An endpoint is an address at which the daemon listens.
type endpoint struct {
	// name is the name under which the service manager keeps the socket while the daemon restarts. Calls in between
	// wait and are not refused.
	name, network, address string
	open                   func() (net.Listener, error)
}

// listeners are the listeners of a daemon.
type listeners struct {
	peers    net.Listener
	controls []net.Listener
	http     net.Listener // nil: none
	metrics  net.Listener // nil: none
}

func (l *listeners) all() []net.Listener {
	return append([]net.Listener{l.peers, l.http, l.metrics}, l.controls...)
}

// controlSocket and httpSocket are the names of the endpoints of the control API that socketGroup may use.
const controlSocket, httpSocket = "control", "http"

// listen opens the sockets, or takes those that the service manager has passed.
func (d *Daemon) listen() (_ *listeners, err error) {
	tcp := func(name, address string) endpoint {
		return endpoint{name, "tcp", address, func() (net.Listener, error) { return net.Listen("tcp", address) }}
	}
	endpoints := []endpoint{tcp("peers", d.cfg.Listen), unixSocket(controlSocket, d.cfg.Socket)}
	if d.cfg.ControlListen != "" {
		endpoints = append(endpoints, tcp("operators", d.cfg.ControlListen))
	}
	controls := len(endpoints)
	addOptional := func(name, address string) { // HOST:PORT, the path of a socket, or empty
		switch {
		case filepath.IsAbs(address):
			endpoints = append(endpoints, unixSocket(name, address))
		case address != "":
			endpoints = append(endpoints, tcp(name, address))
		}
	}
	addOptional(httpSocket, d.cfg.HTTPListen)
	addOptional("metrics", d.cfg.MetricsListen)
	// All passed sockets that fit are taken, and the rest closed, before any is opened: the rest is from an earlier
	// configuration, and may have an address that is needed now.
	opened := make([]net.Listener, len(endpoints))
	for i, e := range endpoints {
		if opened[i] = d.sockets.Take(e.network, e.address); opened[i] != nil {
			d.log.Info("listening at a socket of the service manager", "at", e.address)
		}
	}
	for _, name := range d.sockets.Rest() {
		d.log.Warn("closed a socket of the service manager: the configuration has no such address", "name", name)
		d.tellManager(systemd.Forget(name))
	}
	for i, e := range endpoints {
		if opened[i] != nil {
			continue
		}
		if opened[i], err = e.open(); err != nil {
			return nil, errors.Join(fmt.Errorf("listen at %s (%s): %w", e.address, e.name, err), closeAll(opened))
		}
		d.keep(e.name, opened[i])
	}
	// Those who may connect control or see all VMs of the host, so the modes are set even if another process has opened
	// the socket.
	for _, e := range endpoints {
		if e.network != "unix" {
			continue
		}
		err := os.Chmod(e.address, 0o600)
		if err == nil && (e.name == controlSocket || e.name == httpSocket) && d.socketGroup != nil {
			err = giveToGroup(e.address, *d.socketGroup)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s socket: %w", e.name, err), closeAll(opened))
		}
	}
	if _, d.pagePort, err = net.SplitHostPort(opened[0].Addr().String()); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for other daemons: %w", err), closeAll(opened))
	}
	if err := pagelane.Widen(opened[0].(syscall.Conn)); err != nil { // before Confine drops the capability for it
		d.log.Warn("cannot raise the TCP send buffer: migrations over links with long round trips may be slower; "+
			"give the daemon CAP_NET_ADMIN, or raise net.ipv4.tcp_wmem", "error", err)
	}
	l := &listeners{peers: opened[0], controls: opened[1:controls]}
	for i := controls; i < len(endpoints); i++ {
		if endpoints[i].name == httpSocket {
			l.http = opened[i]
		} else {
			l.metrics = opened[i]
		}
	}
	return l, nil
}

// giveToGroup lets a group use a socket.
func giveToGroup(path string, group int) error {
	if err := os.Chown(path, -1, group); err != nil {
		return err
	}
	return os.Chmod(path, 0o660)
}

// lookupGroup returns the number of a group, which is given by name or number.
func lookupGroup(group string) (int, error) {
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("socket_group: %w: make the group, or name another one", err)
	}
	return strconv.Atoi(g.Gid)
}

// keep gives the service manager a socket to keep. The file of a Unix socket then stays when this daemon ends.
func (d *Daemon) keep(name string, l net.Listener) {
	kept, err := systemd.Keep(name, l.(syscall.Conn))
	d.tellManager(err)
	if socket, ok := l.(*net.UnixListener); ok && kept {
		socket.SetUnlinkOnClose(false)
	}
}

// tellManager logs an error of telling the service manager something. The daemon serves nevertheless.
func (d *Daemon) tellManager(err error) {
	if err != nil {
		d.log.Warn("the service manager does not keep this daemon's sockets", "error", err)
	}
}

// unixSocket returns the endpoint of a Unix socket.
func unixSocket(name, path string) endpoint {
	return endpoint{name, "unix", path, func() (net.Listener, error) { return openUnix(path) }}
}

func openUnix(path string) (net.Listener, error) {
	// A daemon that was killed may have left the file. If the socket answers, it
	// is another daemon's.
	if conn, err := net.Dial("unix", path); err == nil {
		return nil, errors.Join(fmt.Errorf("another daemon serves %s", path), conn.Close())
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return net.Listen("unix", path)
}
