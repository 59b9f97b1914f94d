// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// notForQEMU are capabilities over the host as a whole: its kernel, clock, logs and policies, and other processes. The
// rest is left, because a QEMU that runs as root may use it: devices, networks, locked memory.
var notForQEMU = []cap.Value{
	cap.SYS_PTRACE, cap.CHECKPOINT_RESTORE, cap.SYS_MODULE, cap.SYS_BOOT, cap.SYS_TIME, cap.SYS_PACCT, cap.SYS_TTY_CONFIG,
	cap.SYSLOG, cap.PERFMON, cap.MAC_ADMIN, cap.MAC_OVERRIDE, cap.AUDIT_CONTROL, cap.AUDIT_READ, cap.WAKE_ALARM,
	cap.BLOCK_SUSPEND, cap.LINUX_IMMUTABLE,
}

// deniedToQEMU are system calls that neither QEMU nor the helpers that it starts make. QEMU's own -sandbox denies a few
// of them, if it is enabled, and only to QEMU itself. bpf (receive-side scaling), keyctl (secrets in the keyring),
// io_uring, userfaultfd and chroot are not in the list, because QEMU uses them.
var deniedToQEMU = []string{
	"kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff",
	"mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr",
	"pivot_root", "unshare", "setns", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "perf_event_open",
	"open_by_handle_at", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname",
	"syslog", "acct", "quotactl", "fanotify_init", "lookup_dcookie", "iopl", "ioperm", "vhangup", "nfsservctl",
}

// ApplyToStarter takes what no QEMU needs from all threads of this process, which starts QEMUs, and so from the QEMUs.
//
// It cannot be Apply: QEMU may start a set-user-ID program to set up its network, so no_new_privs must stay off.
// Without that, installing a filter of system calls needs CAP_SYS_ADMIN. If the process lacks it, as under
// deploy/migrated.service, ApplyToStarter installs no filter, and that is no error: QEMUs lack the capability as well,
// and without it and those that are dropped here the kernel refuses nearly all of deniedToQEMU anyway.
func ApplyToStarter() error {
	admin, err := cap.GetProc().GetFlag(cap.Effective, cap.SYS_ADMIN)
	if err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	var errs []error
	if admin {
		errs = append(errs, denyToQEMU())
	}
	return errors.Join(append(errs, dropForQEMU())...)
}

// dropForQEMU drops notForQEMU. If the process has CAP_SETPCAP, it drops them from the bounding set as well, so that no
// exec can give them back.
func dropForQEMU() error {
	set := cap.GetProc()
	bounding, err := set.GetFlag(cap.Effective, cap.SETPCAP)
	if err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	for _, c := range notForQEMU {
		if has, err := cap.GetBound(c); err == nil && has && bounding { // an error: this kernel does not know it
			if err := cap.DropBound(c); err != nil {
				return fmt.Errorf("drop %v from the bounding set: %w", c, err)
			}
		}
		for _, flag := range []cap.Flag{cap.Effective, cap.Permitted, cap.Inheritable} {
			if err := set.SetFlag(flag, false, c); err != nil {
				return fmt.Errorf("capabilities: %w", err)
			}
		}
	}
	if err := set.SetProc(); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

// denyToQEMU installs the filter on all threads.
func denyToQEMU() error {
	err := seccomp.LoadFilter(seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls:      []seccomp.SyscallGroup{{Names: deniedToQEMU, Action: seccomp.ActionErrno}}, // EPERM
		},
	})
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return &NotSupportedError{Feature: "filter of system calls", MinKernel: "3.17", Option: "CONFIG_SECCOMP_FILTER"}
	case err != nil:
		return fmt.Errorf("filter of system calls of QEMUs: %w", err)
	}
	return denyOtherABIs()
}

// oneABI refuses the system calls of 32-bit programs. They have other numbers, so that the filter of denyToQEMU, which
// allows by default, would let them pass. struct seccomp_data has the architecture at offset 4.
var oneABI = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 4, Size: 4},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipFalse: 1},
	bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
}

// denyOtherABIs installs oneABI on all threads.
func denyOtherABIs() error {
	raw, err := bpf.Assemble(oneABI)
	if err != nil {
		return fmt.Errorf("filter of the 32-bit ABI: %w", err)
	}
	program := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		program[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// If a thread cannot get the filter, the call returns the number of that thread.
	tid, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("filter of the 32-bit ABI: %w", errno)
	}
	if tid != 0 {
		return fmt.Errorf("filter of the 32-bit ABI: thread %d has another filter", tid)
	}
	return nil
}
