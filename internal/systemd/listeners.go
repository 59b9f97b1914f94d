// SPDX-License-Identifier: Apache-2.0

package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Listeners are sockets that a service manager has passed to this process.
type Listeners struct{ files []*os.File }

// Inherited returns the sockets that the service manager has passed. It works once: it removes the environment
// variables that name them, so that children do not inherit them.
func Inherited() *Listeners { return &Listeners{activation.Files(true)} }

// Take returns the socket that listens at exactly that address; nil: there is none. network is "tcp" or "unix". It does
// not go by the sockets' names, because the configuration may have changed, or a unit may have passed another socket.
func (l *Listeners) Take(network, address string) net.Listener {
	for i, f := range l.files {
		if f == nil {
			continue
		}
		listener, err := listenerOf(f)
		if err != nil {
			continue
		}
		if !listensAt(listener, network, address) {
			_ = listener.Close() // a duplicate
			continue
		}
		_ = f.Close() // the listener has a duplicate
		l.files[i] = nil
		return listener
	}
	return nil
}

// Rest closes the sockets that were not taken, and returns their names.
func (l *Listeners) Rest() (names []string) {
	for _, f := range l.files {
		if f != nil {
			names = append(names, f.Name())
			_ = f.Close() // an error would not matter
		}
	}
	l.files = nil
	return names
}

// listenerOf returns a listener with a duplicate of f. It fails unless f is a listening socket.
func listenerOf(f *os.File) (net.Listener, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	listens, optErr := 0, error(nil)
	if err := raw.Control(func(fd uintptr) {
		listens, optErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	}); err != nil {
		return nil, err
	}
	if optErr != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), optErr)
	}
	if listens == 0 {
		return nil, errors.New(f.Name() + " does not listen")
	}
	return net.FileListener(f)
}

// listensAt says whether a listener has that address.
func listensAt(l net.Listener, network, address string) bool {
	switch have := l.Addr().(type) {
	case *net.UnixAddr:
		// A socket without its file cannot be connected to.
		info, err := os.Lstat(address)
		return network == "unix" && have.Name == address && err == nil && info.Mode().Type() == os.ModeSocket
	case *net.TCPAddr:
		want, err := net.ResolveTCPAddr("tcp", address)
		if network != "tcp" || err != nil || want.Port != have.Port {
			return false
		}
		return have.IP.Equal(want.IP) || want.IP == nil && have.IP.IsUnspecified()
	}
	return false
}
