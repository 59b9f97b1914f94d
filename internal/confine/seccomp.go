// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"errors"
	"fmt"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// allowed are the system calls that the daemon makes, and those that Go 1.26's runtime and its packages os and net may
// also make. To find a call that is missing, set seccomp.ActionTrap as the default: the daemon then ends with a trace
// of the caller, and the end-to-end tests show whether the list is complete. In production a missing call fails with
// EPERM, because a daemon that ends leaves VMs waiting for memory.
//
// This is a list of what is allowed, not of what is forbidden, because the latter would grow with each kernel. The
// filter costs less than 0.1 µs a call. No call in the handling of a fault has a condition on its arguments: the kernel
// caches that such calls are allowed (Linux 5.11), so their place in the list does not matter.
var allowed = []string{
	// Files.
	"access", "faccessat", "faccessat2", "open", "openat", "close", "close_range", "read", "readv", "pread64", "preadv",
	"preadv2", "write", "writev", "pwrite64", "pwritev", "pwritev2", "lseek", "stat", "fstat", "lstat", "newfstatat",
	"statx", "statfs", "fstatfs", "readlink", "readlinkat", "getdents64", "getcwd", "mkdir", "mkdirat", "rename",
	"renameat", "renameat2", "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "fchownat", "fsync",
	"fdatasync", "ftruncate", "fallocate", "fgetxattr", "getxattr", "fcntl", "flock", "ioctl", "dup", "dup3", "pipe2",

	// Network, and sockets of QEMU. socket is in filterSystemCalls, because its arguments are checked.
	"socketpair", "bind", "listen", "accept", "accept4", "connect", "shutdown", "getsockname", "getpeername", "getsockopt",
	"setsockopt", "sendto", "sendmsg", "sendmmsg", "recvfrom", "recvmsg", "recvmmsg", "splice", "sendfile",
	"epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "eventfd2", "poll", "ppoll", "pselect6",

	// Other processes: QEMU.
	"ptrace", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "kill", "wait4", "waitid", "userfaultfd",

	// Memory, threads and time. clone is in filterSystemCalls, because its arguments are checked.
	"brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "mincore", "membarrier", "memfd_create", "futex",
	"sched_yield", "sched_getaffinity", "set_robust_list", "rseq", "arch_prctl", "prctl", "gettid", "exit", "exit_group",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "sigaltstack", "tgkill", "setitimer",
	"timer_create", "timer_settime", "timer_delete", "nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres",
	"gettimeofday", "time", "restart_syscall",

	// Facts about the process and the host.
	"getpid", "getppid", "getuid", "geteuid", "getgid", "getegid", "getgroups", "capget", "uname", "sysinfo", "getrandom",
	"getrlimit", "prlimit64", "getrusage",
}

// filterSystemCalls installs the filter on all threads.
func filterSystemCalls() error {
	var sockets []seccomp.NameWithConditions
	// AF_NETLINK is for net.InterfaceAddrs.
	for _, family := range []uint64{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK} {
		sockets = append(sockets, seccomp.NameWithConditions{
			Name:       "socket",
			Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.Equal, Value: family}},
		})
	}
	thread := seccomp.NameWithConditions{ // a new thread, not a new process
		Name:       "clone",
		Conditions: seccomp.ArgumentConditions{{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD}},
	}
	err := seccomp.LoadFilter(seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno, // EPERM
			Syscalls: []seccomp.SyscallGroup{
				{Names: allowed, Action: seccomp.ActionAllow},
				{NamesWithCondtions: append(sockets, thread), Action: seccomp.ActionAllow},
				// The flags of clone3 are in memory, which a filter cannot read. After ENOSYS, libc uses clone.
				{Names: []string{"clone3"}, Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)},
			},
		},
	})
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return &NotSupportedError{Feature: "filter of system calls", MinKernel: "3.17", Option: "CONFIG_SECCOMP_FILTER"}
	case err != nil:
		return fmt.Errorf("filter of system calls: %w", err)
	}
	return nil
}
