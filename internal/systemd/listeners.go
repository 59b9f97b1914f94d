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

// Listeners are sockets that a service manager handed over.
type Listeners struct{ files []*os.File }

// Inherited takes what the service manager handed to this process, once: children are handed nothing.
func Inherited() *Listeners { return &Listeners{activation.Files(true)} }

// Take returns the socket that listens at exactly that address, nil where none does. A name proves nothing: the
// configuration may have changed, or a unit may hand over something else. network is "tcp" or "unix".
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

// Rest closes what nobody took and returns its names.
func (l *Listeners) Rest() (names []string) {
	for _, f := range l.files {
		if f != nil {
			names = append(names, f.Name())
			_ = f.Close() // nobody uses it
		}
	}
	l.files = nil
	return names
}

// listenerOf makes a listener of a duplicate of f, if it is a socket that listens.
func listenerOf(f *os.File) (net.Listener, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	listens, optErr := 0, error(nil)
	if err := raw.Control(func(fd uintptr) { listens, optErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN) }); err != nil {
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

func listensAt(l net.Listener, network, address string) bool {
	switch at := l.Addr().(type) {
	case *net.UnixAddr:
		// A socket whose file is gone is one that nobody finds.
		info, err := os.Lstat(address)
		return network == "unix" && at.Name == address && err == nil && info.Mode().Type() == os.ModeSocket
	case *net.TCPAddr:
		want, err := net.ResolveTCPAddr("tcp", address)
		if network != "tcp" || err != nil || want.Port != at.Port {
			return false
		}
		return at.IP.Equal(want.IP) || want.IP == nil && at.IP.IsUnspecified()
	}
	return false
}
