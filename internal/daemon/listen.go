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
)

// An endpoint is where the daemon listens.
type endpoint struct {
	// name is what the service manager keeps the socket as, for the daemon that is started after this one: who calls in
	// between waits instead of being refused.
	name, network, address string
	open                   func() (net.Listener, error)
}

// listeners are the daemon's.
type listeners struct {
	peers    net.Listener
	controls []net.Listener
	metrics  net.Listener // nil: none
}

func (l *listeners) all() []net.Listener {
	return append([]net.Listener{l.peers, l.metrics}, l.controls...)
}

// controlSocket is the name of the control API's Unix socket.
const controlSocket = "control"

// listen opens the sockets, or takes those that the service manager hands over.
func (d *Daemon) listen() (_ *listeners, err error) {
	tcp := func(name, address string) endpoint {
		return endpoint{name, "tcp", address, func() (net.Listener, error) { return net.Listen("tcp", address) }}
	}
	endpoints := []endpoint{tcp("peers", d.cfg.Listen), unixSocket(controlSocket, d.cfg.Socket)}
	if d.cfg.ControlListen != "" {
		endpoints = append(endpoints, tcp("operators", d.cfg.ControlListen))
	}
	metricsAt := -1
	if at := d.cfg.MetricsListen; at != "" {
		metricsAt = len(endpoints)
		if filepath.IsAbs(at) {
			endpoints = append(endpoints, unixSocket("metrics", at))
		} else {
			endpoints = append(endpoints, tcp("metrics", at))
		}
	}
	// All that fit are taken before any is opened: the others are of another configuration, and may be in the way.
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
	// Who may connect controls every VM of the host, or sees them, also where another opened the socket.
	for _, e := range endpoints {
		if e.network != "unix" {
			continue
		}
		err := os.Chmod(e.address, 0o600)
		if err == nil && e.name == controlSocket && d.socketGroup != nil {
			err = giveToGroup(e.address, *d.socketGroup)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s socket: %w", e.name, err), closeAll(opened))
		}
	}
	if _, d.pagePort, err = net.SplitHostPort(opened[0].Addr().String()); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for other daemons: %w", err), closeAll(opened))
	}
	l := &listeners{peers: opened[0], controls: opened[1:]}
	if metricsAt >= 0 {
		l.controls, l.metrics = opened[1:metricsAt], opened[metricsAt]
	}
	return l, nil
}

// giveToGroup lets a group use a socket that is its owner's alone.
func giveToGroup(path string, group int) error {
	if err := os.Chown(path, -1, group); err != nil {
		return err
	}
	return os.Chmod(path, 0o660)
}

// lookupGroup is the number of a group, which is given by name or number.
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

// keep gives the service manager a socket. Its file then outlives this daemon too.
func (d *Daemon) keep(name string, l net.Listener) {
	kept, err := systemd.Keep(name, l.(syscall.Conn))
	d.tellManager(err)
	if socket, ok := l.(*net.UnixListener); ok && kept {
		socket.SetUnlinkOnClose(false)
	}
}

// tellManager logs that the service manager could not be told something, which is no reason not to serve.
func (d *Daemon) tellManager(err error) {
	if err != nil {
		d.log.Warn("the service manager does not keep this daemon's sockets", "error", err)
	}
}

// unixSocket is an endpoint at a path.
func unixSocket(name, path string) endpoint {
	return endpoint{name, "unix", path, func() (net.Listener, error) { return openUnix(path) }}
}

func openUnix(path string) (net.Listener, error) {
	// A socket left by a daemon that was killed is in the way; one that answers
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
