// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// DevicePath is the device whose file permissions decide who may make userfaultfds that also see
// faults taken by the kernel, without any capability (Linux 6.1).
const DevicePath = "/dev/userfaultfd"

// OpenMethod is a way to make a userfaultfd.
type OpenMethod int

const (
	// OpenSyscall is userfaultfd(2). Faults in kernel mode need CAP_SYS_PTRACE or
	// vm.unprivileged_userfaultfd=1.
	OpenSyscall OpenMethod = iota

	// OpenDevice is USERFAULTFD_IOC_NEW on /dev/userfaultfd.
	OpenDevice
)

func (m OpenMethod) String() string {
	if m == OpenDevice {
		return DevicePath
	}
	return "userfaultfd(2)"
}

// OpenOptions chooses how Open makes a descriptor. It is always close-on-exec.
type OpenOptions struct {
	Method OpenMethod

	// UserModeOnly asks for a descriptor that any process may make, but that turns faults taken inside
	// the kernel into SIGBUS or EFAULT. KVM takes its faults there: virtual machines cannot use it.
	UserModeOnly bool

	// NonBlocking makes Read give ErrWouldBlock instead of waiting. poll(2) works on a
	// userfaultfd only in this mode.
	NonBlocking bool
}

// Open makes a userfaultfd for the address space of this process. Before anything else, call API.
//
// It fails with a *NotSupportedError where the kernel lacks the method, and with an error that is
// fs.ErrPermission, and says what would permit it, where the process may not.
func Open(o OpenOptions) (*UFFD, error) {
	flags := uintptr(unix.O_CLOEXEC)
	if o.NonBlocking {
		flags |= unix.O_NONBLOCK
	}
	if o.UserModeOnly {
		flags |= abi.UFFD_USER_MODE_ONLY
	}
	if o.Method == OpenDevice {
		return openDevice(flags)
	}

	fd, errno := sysUserfaultfd(flags)
	switch {
	case errno == 0:
		return FromFD(fd), nil
	case errno == unix.ENOSYS:
		return nil, &NotSupportedError{Feature: "userfaultfd(2)", MinKernel: "4.3"}
	case errno == unix.EINVAL && o.UserModeOnly:
		return nil, &NotSupportedError{Feature: "UFFD_USER_MODE_ONLY", MinKernel: "5.11"}
	case errno == unix.EPERM:
		return nil, fmt.Errorf("userfaultfd(2): %w: it needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1; otherwise use %s",
			errno, DevicePath)
	}
	return nil, fmt.Errorf("userfaultfd(2): %w", errno)
}

func openDevice(flags uintptr) (*UFFD, error) {
	dev, err := os.OpenFile(DevicePath, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, &NotSupportedError{Feature: DevicePath, MinKernel: "6.1"}
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: give this user access to the device (a udev rule or an ACL)", err)
	case err != nil:
		return nil, err
	}
	defer dev.Close()

	fd, errno := ioctlNew(int(dev.Fd()), flags)
	if errno != 0 {
		return nil, fmt.Errorf("USERFAULTFD_IOC_NEW on %s: %w", DevicePath, errno)
	}
	return FromFD(fd), nil
}
