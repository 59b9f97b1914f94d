// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/config"
)

// TestFailedListenerEndsTheDaemon: a daemon that accepts no more connections at one of its addresses ends, to be
// started again, although its other servers go on.
func TestFailedListenerEndsTheDaemon(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.StateDir, cfg.LogDir =
		freeAddress(t), filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "log")
	cfg.Socket = filepath.Join(t.TempDir(), "control.sock")
	_, stop, ended := runDaemon(t, cfg)
	failAccept(t, cfg.Listen)
	select {
	case err := <-ended:
		if !errors.Is(err, syscall.EINVAL) {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it goes on without a server for other daemons")
		stop()
		t.Log(<-ended)
	}
}

// failAccept has accept(2) fail for good at the socket of this process that listens at an address.
func failAccept(t *testing.T, address string) {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		fd, err := strconv.Atoi(file.Name())
		if err != nil {
			t.Fatal(err)
		}
		if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens == 0 {
			continue
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		in, isIPv4 := name.(*unix.SockaddrInet4)
		if isIPv4 && net.JoinHostPort(net.IP(in.Addr[:]).String(), strconv.Itoa(in.Port)) == address {
			if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no socket listens at %s", address)
}
