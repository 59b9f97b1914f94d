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

// DevicePath is the device that makes userfaultfds (Linux 6.1). Whoever may open the file needs no capability for
// descriptors that also see faults taken by the kernel.
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

// OpenOptions says how Open makes a descriptor. Every descriptor is close-on-exec.
type OpenOptions struct {
	Method OpenMethod

	// UserModeOnly asks for a descriptor that any process may make. Faults taken inside the kernel then
	// become SIGBUS or EFAULT. KVM takes its faults in the kernel: virtual machines cannot use it.
	UserModeOnly bool

	// NonBlocking makes Read return ErrWouldBlock instead of waiting. poll(2) works on a
	// userfaultfd only in this mode.
	NonBlocking bool

	// ForkEvents asks for a descriptor on which API can enable FeatureEventFork. Without it, the descriptor is
	// made with UFFD_SECURE where the kernel has that flag.
	ForkEvents bool
}

// Open makes a userfaultfd for the address space of this process. Call API before anything else.
//
// It fails with a *NotSupportedError if the kernel lacks the method. If the process lacks permission, the error
// is fs.ErrPermission and says what would permit it.
func Open(o OpenOptions) (*UFFD, error) {
	flags := uintptr(unix.O_CLOEXEC)
	if o.NonBlocking {
		flags |= unix.O_NONBLOCK
	}
	if o.UserModeOnly {
		flags |= abi.UFFD_USER_MODE_ONLY
	}
	if o.Method == OpenDevice {
		return openDevice(flags, !o.ForkEvents && AsksSecure())
	}

	u, errno := create(flags, !o.ForkEvents && AsksSecure(), sysUserfaultfd)
	switch {
	case errno == 0:
		return u, nil
	case errno == unix.ENOSYS:
		return nil, &NotSupportedError{Feature: "userfaultfd(2)", MinKernel: "4.3"}
	case errno == unix.EINVAL && o.UserModeOnly:
		return nil, &NotSupportedError{Feature: "UFFD_USER_MODE_ONLY", MinKernel: "5.11"}
	case errno == unix.EPERM:
		return nil, fmt.Errorf(
			"userfaultfd(2): %w: it needs CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1; otherwise use %s",
			errno, DevicePath)
	case errno == unix.EACCES:
		return nil, fmt.Errorf("userfaultfd(2): %w: a security module refuses; see the audit log", errno)
	}
	return nil, fmt.Errorf("userfaultfd(2): %w", errno)
}

// create asks for a userfaultfd. If secure is true, it first asks with UFFD_SECURE. A kernel without the flag answers
// EINVAL, but checks permission first: EPERM would be the answer without the flag, too. After EINVAL, create asks
// again without UFFD_SECURE; a second EINVAL means that another flag is invalid.
func create(flags uintptr, secure bool, ask func(flags uintptr) (int, unix.Errno)) (*UFFD, unix.Errno) {
	if secure {
		fd, errno := ask(flags | abi.UFFD_SECURE)
		if errno == 0 {
			return FromSecureFD(fd), 0
		}
		if errno != unix.EINVAL {
			return nil, errno
		}
	}
	fd, errno := ask(flags)
	if errno != 0 {
		return nil, errno
	}
	return FromFD(fd), 0
}

func openDevice(flags uintptr, secure bool) (*UFFD, error) {
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

	u, errno := create(flags, secure, func(flags uintptr) (int, unix.Errno) { return ioctlNew(int(dev.Fd()), flags) })
	if errno != 0 {
		return nil, fmt.Errorf("USERFAULTFD_IOC_NEW on %s: %w", DevicePath, errno)
	}
	return u, nil
}
