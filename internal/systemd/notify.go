// SPDX-License-Identifier: Apache-2.0

// Package systemd is the daemon's interface to its service manager: sd_notify(3), and descriptors that the
// manager keeps while the daemon restarts (FileDescriptorStoreMax= in systemd.service(5)) or has opened
// before it started (systemd.socket(5)). Without systemd, its functions do nothing.
package systemd

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Notify sends the daemon's state, such as "READY=1", to the service manager. Without a service manager it
// does nothing.
func Notify(state string) error { return notify(state) }

// Keep gives the service manager a duplicate of a descriptor, which it passes to the next daemon under that name. kept
// is false if there is no service manager. One whose unit does not allow it to keep descriptors silently drops it.
func Keep(name string, c syscall.Conn) (kept bool, err error) {
	if os.Getenv(socketVariable) == "" {
		return false, nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return false, err
	}
	var notifyErr error
	if err := raw.Control(func(fd uintptr) { notifyErr = notify("FDSTORE=1\nFDNAME="+name, int(fd)) }); err != nil {
		return false, err
	}
	return notifyErr == nil, notifyErr
}

// Forget makes the service manager close the descriptors that it keeps under that name.
func Forget(name string) error { return notify("FDSTOREREMOVE=1\nFDNAME=" + name) }

const socketVariable = "NOTIFY_SOCKET"

// notify sends one datagram with descriptors.
func notify(state string, fds ...int) error {
	path := os.Getenv(socketVariable)
	if path == "" {
		return nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("service manager: %w", err)
	}
	defer unix.Close(fd)
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	// SockaddrUnix, like the protocol, uses a leading @ for the abstract name space.
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: path}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("service manager: %s: %w", path, err)
	}
	return nil
}
