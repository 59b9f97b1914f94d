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

// notForQEMU are capabilities of the host as a whole: of its kernel, clock, logs and policies, and of other processes.
// What is not among them some QEMU may use that its operator runs as root: devices, networks, locked memory.
var notForQEMU = []cap.Value{
	cap.SYS_PTRACE, cap.CHECKPOINT_RESTORE, cap.SYS_MODULE, cap.SYS_BOOT, cap.SYS_TIME, cap.SYS_PACCT, cap.SYS_TTY_CONFIG,
	cap.SYSLOG, cap.PERFMON, cap.MAC_ADMIN, cap.MAC_OVERRIDE, cap.AUDIT_CONTROL, cap.AUDIT_READ, cap.WAKE_ALARM, cap.BLOCK_SUSPEND,
	cap.LINUX_IMMUTABLE,
}

// deniedToQEMU are system calls that no QEMU makes, and none of the helpers that it starts. QEMU's own -sandbox denies a
// few of them, only where it is asked for and only to QEMU. Not bpf (receive-side scaling), keyctl (secrets in the
// keyring), io_uring, userfaultfd or chroot, all of which QEMU has uses for.
var deniedToQEMU = []string{
	"kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff",
	"mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "pivot_root",
	"unshare", "setns", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "perf_event_open", "open_by_handle_at",
	"settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname",
	"syslog", "acct", "quotactl", "fanotify_init", "lookup_dcookie", "iopl", "ioperm", "vhangup", "nfsservctl",
}

// ApplyToStarter takes from all threads of this process, which starts QEMUs, and so from those what no QEMU needs.
//
// It cannot be Apply: a QEMU brings its network up with a set-user-ID program, so there is no no_new_privs. Without that a
// filter of system calls takes CAP_SYS_ADMIN. Where the process does not have it, as under deploy/migrated.service, no
// QEMU gets it either, and without it and the capabilities that are dropped here the kernel refuses nearly all of
// deniedToQEMU anyway: then there is no filter, and that is no error.
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

// dropForQEMU drops notForQEMU, for good where the process has CAP_SETPCAP.
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
		if has, err := cap.GetBound(c); err == nil && has && bounding { // else not known to this kernel, or not there
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

// oneABI refuses the system calls of 32-bit programs, which have other numbers: a filter that allows by default would let
// them pass. struct seccomp_data has the architecture at offset 4.
var oneABI = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 4, Size: 4},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipFalse: 1},
	bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
}

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
	// A thread that could not get it is answered by its number.
	tid, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("filter of the 32-bit ABI: %w", errno)
	}
	if tid != 0 {
		return fmt.Errorf("filter of the 32-bit ABI: thread %d has another filter", tid)
	}
	return nil
}
