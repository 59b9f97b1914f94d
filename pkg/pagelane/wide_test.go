// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestWiden: the socket of a lane has a send buffer of sendBuffer bytes if its listener was widened, and otherwise one
// of the host's size.
func TestWiden(t *testing.T) {
	for name, wide := range map[string]bool{"widened": true, "as it was": false} {
		t.Run(name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			if wide {
				if !mayForce(t) {
					testenv.CannotRun(t, "buffers of a size of one's own need CAP_NET_ADMIN")
				}
				if err := Widen(listener.(*net.TCPListener)); err != nil {
					t.Fatal(err)
				}
			}
			streams := make(chan *Stream, 1)
			serveAt(t, listener, insecure.NewCredentials(), true, func(s *Stream) error {
				streams <- s
				return echo(s)
			})
			lane, err := open(t, listener.Addr().String(), insecure.NewCredentials(), nil)
			if err != nil {
				t.Fatal(err)
			}
			fetch(t, lane, 0, 4096) // after this, the server's socket is out of the poller
			var sends int
			controlErr := (<-streams).socket.raw.Control(func(fd uintptr) {
				sends, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
			})
			if err := errors.Join(controlErr, err); err != nil {
				t.Fatal(err)
			}
			if (sends >= sendBuffer) != wide {
				t.Errorf("TCP keeps %d bytes of what the lane sends", sends)
			}
		})
	}
}

// mayForce says whether this process may exceed the host's limits for socket buffers.
func mayForce(t *testing.T) bool {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) == nil
}
