// SPDX-License-Identifier: Apache-2.0

// Package systemd is what the daemon and its service manager say to each other: sd_notify(3), and the descriptors that
// the manager keeps while no daemon runs (FileDescriptorStoreMax= in systemd.service(5)) or opened before one did
// (systemd.socket(5)). Without a service manager, or with another one, there is nobody to tell, and nothing is handed over.
package systemd

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Notify tells the service manager the daemon's state, as in "READY=1". An error is one of a service manager that exists.
func Notify(state string) error { return notify(state) }

// Keep gives the service manager a duplicate of a descriptor, which it hands to the next daemon under that name, and says
// whether there is one to give it to. One whose unit does not let it keep descriptors drops it without a word.
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

// Forget has the service manager close what it keeps under that name.
func Forget(name string) error { return notify("FDSTOREREMOVE=1\nFDNAME=" + name) }

const socketVariable = "NOTIFY_SOCKET"

// notify sends one datagram, and the descriptors with it.
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
	// A leading @ means the abstract name space, here as in the protocol.
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: path}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("service manager: %s: %w", path, err)
	}
	return nil
}
