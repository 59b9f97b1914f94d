// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"io"
	"net"
	"os"
	"strings"
	"testing"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
)

// TestSignalledAfterReboot: libvirt ends a domain by a signal and forwards no SHUTDOWN of that. follow adds it, also
// where the guest had powered off before and libvirt had it start again. It adds none to the guest's own.
func TestSignalledAfterReboot(t *testing.T) {
	for name, c := range map[string]struct {
		events []string
		added  bool
	}{
		"nothing before":                 {nil, true},
		"the guest powered off":          {[]string{"SHUTDOWN", "STOP"}, false},
		"it was started again":           {[]string{"SHUTDOWN", "STOP", "RESET", "RESUME"}, true},
		"and the guest did so once more": {[]string{"SHUTDOWN", "RESET", "RESUME", "SHUTDOWN"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := connPair(t)
			ended := make(chan struct{})
			m := &monitor{
				domain: &Domain{}, conn: ours, ended: ended,
				followed: make(chan struct{}), changed: make(chan struct{}, 1),
			}
			events := make(chan golibvirt.DomainEvent)
			endings := make(chan golibvirt.DomainEventLifecycleMsg)
			go m.follow(t.Context(), events, endings)
			go func() {
				defer close(events)
				defer close(endings)
				for _, name := range c.events {
					events <- golibvirt.DomainEvent{Event: name}
				}
				close(ended)
				endings <- golibvirt.DomainEventLifecycleMsg{
					Event: int32(golibvirt.DomainEventStopped), Detail: int32(golibvirt.DomainEventStoppedDestroyed),
				}
				<-m.followed
			}()
			said, err := io.ReadAll(theirs)
			if err != nil {
				t.Fatal(err)
			}
			if added := strings.Contains(string(said), "host-signal"); added != c.added {
				t.Errorf("SHUTDOWN was added: %v, want %v:\n%s", added, c.added, said)
			}
		})
	}
}

// connPair returns two connected sockets.
func connPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socket")
		conn, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		file.Close()
		conns[i] = conn.(*net.UnixConn)
		t.Cleanup(func() { conn.Close() })
	}
	return conns[0], conns[1]
}
