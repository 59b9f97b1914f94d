// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// TestCreate simulates kernels that this machine does not run. What a kernel checks first decides what its answer
// means.
func TestCreate(t *testing.T) {
	const userMode, secure = abi.UFFD_USER_MODE_ONLY, abi.UFFD_SECURE
	knows := func(flags, known uintptr) unix.Errno {
		if flags&^(unix.O_CLOEXEC|known) != 0 {
			return unix.EINVAL
		}
		return 0
	}
	first := func(errnos ...unix.Errno) unix.Errno {
		for _, e := range errnos {
			if e != 0 {
				return e
			}
		}
		return 0
	}
	unless := func(permitted bool, e unix.Errno) unix.Errno {
		if permitted {
			return 0
		}
		return e
	}
	kernels := map[string]func(flags uintptr) unix.Errno{
		"series":   func(f uintptr) unix.Errno { return knows(f, userMode|secure) },
		"mainline": func(f uintptr) unix.Errno { return knows(f, userMode) },
		"mainline, unprivileged": func(f uintptr) unix.Errno {
			return first(unless(f&userMode != 0, unix.EPERM), knows(f, userMode))
		},
		"series, sysctl 2, unprivileged": func(f uintptr) unix.Errno {
			return first(unless(f&secure != 0, unix.EPERM), knows(f, userMode|secure))
		},
		"5.10":               func(f uintptr) unix.Errno { return knows(f, 0) },
		"5.10, unprivileged": func(uintptr) unix.Errno { return unix.EPERM },
		"series, denied":     func(f uintptr) unix.Errno { return first(knows(f, userMode|secure), unix.EACCES) },
		"mainline, denied":   func(f uintptr) unix.Errno { return first(knows(f, userMode), unix.EACCES) },
	}
	for _, tt := range []struct {
		kernel string
		flags  uintptr
		secure bool // asked for
		want   unix.Errno
		got    bool // the descriptor is secure
	}{
		{"series", 0, true, 0, true},
		{"series", userMode, true, 0, true},
		{"series", 0, false, 0, false},
		{"mainline", 0, true, 0, false},
		{"mainline", userMode, true, 0, false},
		{"mainline, unprivileged", 0, true, unix.EPERM, false},
		{"mainline, unprivileged", userMode, true, 0, false},
		{"series, sysctl 2, unprivileged", 0, true, 0, true},
		{"series, sysctl 2, unprivileged", userMode, false, unix.EPERM, false},
		{"5.10", 0, true, 0, false},
		{"5.10", userMode, true, unix.EINVAL, false},
		{"5.10, unprivileged", 0, true, unix.EPERM, false},
		{"series, denied", 0, true, unix.EACCES, false},
		{"mainline, denied", 0, true, unix.EACCES, false},
	} {
		asked := 0
		u, errno := create(unix.O_CLOEXEC|tt.flags, tt.secure, func(flags uintptr) (int, unix.Errno) {
			asked++
			if flags&unix.O_CLOEXEC == 0 {
				t.Errorf("%s: not close-on-exec", tt.kernel)
			}
			return 99, kernels[tt.kernel](flags)
		})
		if errno != tt.want || (u == nil) != (errno != 0) || u != nil && u.secure.Load() != tt.got || asked > 2 {
			t.Errorf("%s, flags %#x, secure %v: %v, %+v after %d calls; want %v, secure %v",
				tt.kernel, tt.flags, tt.secure, errno, u, asked, tt.want, tt.got)
		}
	}
}

// TestPolicyHasClass checks that a policy without the class counts as none: it permits everything, whatever the labels
// are.
func TestPolicyHasClass(t *testing.T) {
	classes := filepath.Join(t.TempDir(), "class")
	if !policyHasClass(classes) {
		t.Error("no selinuxfs to be seen: the label must do")
	}
	if err := os.Mkdir(classes, 0o700); err != nil {
		t.Fatal(err)
	}
	if policyHasClass(classes) {
		t.Error("a policy without the class")
	}
	if err := os.Mkdir(filepath.Join(classes, "anon_inode"), 0o700); err != nil {
		t.Fatal(err)
	}
	if !policyHasClass(classes) {
		t.Error("a policy with the class")
	}
}

// TestSecureFlagOfAnotherKind checks that the flag is not used on a kernel that gives it another meaning. Such a kernel
// offers fork events with it.
func TestSecureFlagOfAnotherKind(t *testing.T) {
	other := func(flags uintptr) (int, unix.Errno) {
		fd, errno := sysUserfaultfd(flags &^ abi.UFFD_SECURE) // the flag means something else here
		if errno != 0 {
			t.Fatal(errno)
		}
		return fd, 0
	}
	if isSecureFlag(other) {
		t.Error("a flag with fork events is taken for UFFD_SECURE")
	}
	for errno, want := range map[unix.Errno]bool{unix.EINVAL: false, unix.EPERM: true, unix.EACCES: true} {
		if got := isSecureFlag(func(uintptr) (int, unix.Errno) { return -1, errno }); got != want {
			t.Errorf("after %v it is asked for: %v", errno, got)
		}
	}
	fd, errno := sysUserfaultfd(unix.O_CLOEXEC | abi.UFFD_USER_MODE_ONLY | abi.UFFD_SECURE)
	if errno == 0 {
		unix.Close(fd)
	}
	if AsksSecure() != (errno == 0) {
		t.Errorf("this kernel says %v to the flag, and it is asked for: %v", errno, AsksSecure())
	}
}
