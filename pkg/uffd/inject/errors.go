// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrPtraceDenied says that we may not trace the process (EPERM). The wrapped text names the remedy.
	ErrPtraceDenied = errors.New("ptrace is not permitted")

	// ErrAlreadyTraced says that another process (a debugger, strace, another daemon) traces this one. Linux
	// allows one tracer at a time.
	ErrAlreadyTraced = errors.New("process is already being traced")

	// ErrProcessGone says that the process ended before or during the operation. errors.Is also matches
	// unix.ESRCH.
	ErrProcessGone = fmt.Errorf("process is gone: %w", unix.ESRCH)

	// ErrUnsupported says that system calls cannot be injected: this architecture, or a 32-bit process.
	ErrUnsupported = errors.New("injecting system calls is not supported")

	// ErrSeccomp says that a seccomp filter of the process refused the injected call. Either it answered with SIGSYS
	// (SECCOMP_RET_TRAP), which was suppressed so that the process did not see it; or it would
	// have killed the process, and the call was not made.
	ErrSeccomp = errors.New("refused by the process' seccomp filter")

	// ErrForbidden says that a security module (SELinux, for example) forbids the process to create a userfaultfd, or
	// us to receive it (EACCES), or the process to receive a file.
	ErrForbidden = errors.New("a security module forbids it")

	// ErrNotRestored says that the thread could not be restored after the injected call. The call is stuck
	// in uninterruptible sleep, or the thread's registers cannot be written. The thread stays traced and stopped.
	// It is restored and detached in the background as soon as that works.
	ErrNotRestored = errors.New("the process is held, because its own state could not be restored yet")

	// ErrNotUserfault says that a descriptor number is not, or no longer, a userfaultfd.
	ErrNotUserfault = errors.New("descriptor is not a userfaultfd")
)

// seizeError turns the errno of PTRACE_SEIZE into an error that an operator can act on.
func seizeError(tid int, err error) error {
	switch {
	case errors.Is(err, unix.ESRCH):
		return fmt.Errorf("trace thread %d: %w", tid, ErrProcessGone)
	case !errors.Is(err, unix.EPERM):
		return fmt.Errorf("trace thread %d: %w", tid, err)
	}
	// The kernel returns EPERM for a zombie, for a traced process and for a missing privilege.
	st, statErr := readStatus(tid)
	if statErr != nil || st.state == 'Z' || st.state == 'X' {
		return fmt.Errorf("trace thread %d: %w", tid, ErrProcessGone)
	}
	if st.tracer != 0 {
		tracer, _ := readStatus(st.tracer) // group is 0 if it has just ended, or is outside our PID namespace
		return fmt.Errorf("trace thread %d: %w by process %d: detach that and try again: %w",
			tid, ErrAlreadyTraced, tracer.group, err)
	}
	return fmt.Errorf("trace thread %d: %w: %s: %w", tid, ErrPtraceDenied, deniedRemedy(), err)
}

// deniedRemedy names the most likely reason and its remedy. Yama is documented in the kernel's
// admin-guide/LSM/Yama.rst.
func deniedRemedy() string {
	scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err == nil && strings.TrimSpace(string(scope)) == "3" {
		return "kernel.yama.ptrace_scope is 3, which forbids ptrace to everyone until reboot; boot with 2 or less"
	}
	remedy := "run the daemon as root or with CAP_SYS_PTRACE (in a container: also in the user namespace of the VM)"
	if err == nil && strings.TrimSpace(string(scope)) != "0" {
		remedy += fmt.Sprintf("; kernel.yama.ptrace_scope is %s", strings.TrimSpace(string(scope)))
	}
	return remedy + "; if it has the capability, look for a denial by SELinux or AppArmor in the audit log"
}

// forbidden says that a security module forbade process pid to do what. The text has the process' label, if there is
// one.
func forbidden(pid int, what string, err error) error {
	who := fmt.Sprintf("process %d", pid)
	if label, readErr := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", pid)); readErr == nil {
		if text := strings.TrimRight(string(label), "\x00\n"); text != "" {
			who += " (" + text + ")"
		}
	}
	return fmt.Errorf("%w: %s may not %s: %w", ErrForbidden, who, what, err)
}

// both joins two errors. If both are ErrProcessGone, it returns the first alone.
func both(err, then error) error {
	if errors.Is(err, ErrProcessGone) && errors.Is(then, ErrProcessGone) {
		return err
	}
	return errors.Join(err, then)
}
