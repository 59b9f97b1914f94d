// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Host checks whether this process on this host can take part in migrations. requireSecure means that the host, as a
// destination, has require_secure set.
func Host(ctx context.Context, requireSecure bool) []Result {
	results := []Result{checkKernel(), checkUserfaultfd()}
	if ctx.Err() != nil {
		return results
	}
	return append(results,
		checkUserfaultfdOfQEMU(), checkHugePages(), checkSupervision(requireSecure), checkPtrace(), checkProc())
}

// checkKernel checks for pidfd_getfd(2), which every destination needs: it takes the descriptor that QEMU made.
func checkKernel() Result {
	r := Result{Subject: "kernel"}
	release, err := KernelRelease()
	if err != nil {
		r.Status, r.Detail, r.Remedy = Failed, err.Error(), "see that this process may call uname(2)"
		return r
	}
	r.Detail = "Linux " + release
	// An invalid pidfd tells kernels apart: a kernel with the call returns EBADF, one without it ENOSYS.
	if _, err := unix.PidfdGetfd(-1, 0, 0); errors.Is(err, unix.ENOSYS) {
		r.Status, r.Remedy = Failed, "use Linux 5.11 or newer"
		r.Detail += " has no pidfd_getfd(2)"
	}
	return r
}

// KernelRelease returns the kernel release, as uname -r prints it.
func KernelRelease() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(name.Release[:]), nil
}

func checkUserfaultfd() Result {
	r := Result{Subject: "userfaultfd"}
	need := uffd.FeatureMissingShmem | uffd.FeatureMissingHugetlbfs | uffd.FeatureEventRemove
	var unsupported *uffd.NotSupportedError
	switch err := uffd.HaveFeatures(need); {
	case errors.As(err, &unsupported):
		r.Status, r.Detail, r.Remedy = Failed, err.Error(),
			"use a kernel built with CONFIG_USERFAULTFD, CONFIG_SHMEM and CONFIG_HUGETLBFS"
	case err != nil:
		r.Status, r.Detail, r.Remedy = Failed, err.Error(),
			"see that no seccomp filter or container policy forbids userfaultfd(2)"
	default:
		r.Detail = "the kernel fills missing pages of tmpfs and hugetlbfs"
	}
	return r
}

// checkUserfaultfdOfQEMU checks whether an unprivileged QEMU can get a userfaultfd, in one of two ways.
func checkUserfaultfdOfQEMU() Result {
	r := Result{Subject: "userfaultfd for QEMU"}
	dev, err := os.OpenFile(uffd.DevicePath, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		dev.Close()
		r.Detail = uffd.DevicePath + " can be handed to a QEMU of any user"
		return r
	}
	setting, readErr := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	// 2 comes from the patch series of UFFD_SECURE. It permits a userfaultfd that is made with that flag.
	if value := strings.TrimSpace(string(setting)); readErr == nil && (value == "1" || value == "2") {
		r.Detail = "vm.unprivileged_userfaultfd=" + value + " lets every process make one"
		return r
	}
	r.Status = Warning
	if errors.Is(err, fs.ErrNotExist) {
		r.Detail = "there is no " + uffd.DevicePath + ", so only a QEMU with CAP_SYS_PTRACE can be a destination"
		r.Remedy = "use Linux 6.1 or newer with /dev mounted, or set vm.unprivileged_userfaultfd=1"
		return r
	}
	r.Detail = fmt.Sprintf("%v, so only a QEMU with CAP_SYS_PTRACE can be a destination", err)
	r.Remedy = "give this daemon's user access to " + uffd.DevicePath
	return r
}

// checkPtrace checks whether the daemon may use ptrace, which it needs to run a system call in another process.
func checkPtrace() Result {
	r := Result{Subject: "ptrace"}
	status, err := process.Status(os.Getpid())
	if err != nil {
		r.Status, r.Detail, r.Remedy = Failed, err.Error(), "mount /proc"
		return r
	}
	capabilities, err := strconv.ParseUint(status["CapEff"], 16, 64)
	if err != nil {
		r.Status, r.Detail, r.Remedy = Failed, "effective capabilities: "+err.Error(),
			"see that /proc/self/status is readable"
		return r
	}
	privileged := capabilities&(1<<unix.CAP_SYS_PTRACE) != 0
	scope := 0 // 0: Yama is not built in
	if text, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil {
		scope, _ = strconv.Atoi(strings.TrimSpace(string(text))) // the kernel writes a digit
	}
	switch {
	case scope == 3:
		r.Status, r.Detail = Failed, "kernel.yama.ptrace_scope=3 forbids ptrace to everybody until the next boot"
		r.Remedy = "set kernel.yama.ptrace_scope to 2 or less where it is set at boot (sysctl.d), and reboot"
	case privileged:
		r.Detail = "CAP_SYS_PTRACE allows it"
	case scope > 0:
		r.Status, r.Detail = Failed,
			fmt.Sprintf("this process lacks CAP_SYS_PTRACE and kernel.yama.ptrace_scope is %d", scope)
		r.Remedy = "run the daemon as root or with AmbientCapabilities=CAP_SYS_PTRACE"
	default:
		r.Status, r.Detail = Warning, "this process lacks CAP_SYS_PTRACE: only QEMUs of its own user can be destinations"
		r.Remedy = "run the daemon as root or with AmbientCapabilities=CAP_SYS_PTRACE"
	}
	return r
}

// checkProc checks whether /proc hides the processes of other users.
func checkProc() Result {
	r := Result{Subject: "/proc", Detail: "processes of other users can be seen"}
	if _, err := os.Stat("/proc/1/maps"); err != nil {
		r.Status, r.Detail, r.Remedy = Warning, "processes of other users are hidden: "+err.Error(),
			"mount /proc without hidepid, or run the daemon as root"
	}
	return r
}
