// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
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

// listen opens the sockets, or takes those that the service manager hands over.
func (d *Daemon) listen() (peers net.Listener, controls []net.Listener, err error) {
	tcp := func(name, address string) endpoint {
		return endpoint{name, "tcp", address, func() (net.Listener, error) { return net.Listen("tcp", address) }}
	}
	endpoints := []endpoint{tcp("peers", d.cfg.Listen), {"control", "unix", d.cfg.Socket, d.openControl}}
	if d.cfg.ControlListen != "" {
		endpoints = append(endpoints, tcp("operators", d.cfg.ControlListen))
	}
	// All that fit are taken before any is opened: the others are of another configuration, and may be in the way.
	listeners := make([]net.Listener, len(endpoints))
	for i, e := range endpoints {
		if listeners[i] = d.sockets.Take(e.network, e.address); listeners[i] != nil {
			d.log.Info("listening at a socket of the service manager", "at", e.address)
		}
	}
	for _, name := range d.sockets.Rest() {
		d.log.Warn("closed a socket of the service manager: the configuration has no such address", "name", name)
		d.tellManager(systemd.Forget(name))
	}
	for i, e := range endpoints {
		if listeners[i] != nil {
			continue
		}
		if listeners[i], err = e.open(); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("listen at %s (%s): %w", e.address, e.name, err), closeAll(listeners))
		}
		d.keep(e.name, listeners[i])
	}
	// Who may connect controls every VM of the host, also where another opened the socket.
	if err := os.Chmod(d.cfg.Socket, 0o600); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("control socket: %w", err), closeAll(listeners))
	}
	if _, d.pagePort, err = net.SplitHostPort(listeners[0].Addr().String()); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("listen for other daemons: %w", err), closeAll(listeners))
	}
	return listeners[0], listeners[1:], nil
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

func (d *Daemon) openControl() (net.Listener, error) {
	// A socket left by a daemon that was killed is in the way; one that answers
	// is another daemon's.
	if conn, err := net.Dial("unix", d.cfg.Socket); err == nil {
		return nil, errors.Join(fmt.Errorf("another daemon serves %s", d.cfg.Socket), conn.Close())
	}
	if err := os.Remove(d.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(d.cfg.Socket), 0o755); err != nil {
		return nil, err
	}
	return net.Listen("unix", d.cfg.Socket)
}
