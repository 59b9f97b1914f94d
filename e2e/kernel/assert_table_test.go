// SPDX-License-Identifier: Apache-2.0

package kernel

// An assertion is a test in the guest (kernel/tests) with the expected outcome of each kernel. An empty outcome means
// that the kernel is not asked, because its outcome is a matter of luck. 7.3 has the same outcome unless in73 has
// another.
type assertion struct {
	name, shows    string
	stock, patched string
}

// An outcome is what the kernels of a version are expected to give.
type outcome struct{ stock, patched string }

// in73 are the outcomes of 7.3 that differ from those of 6.12 in the table.
var in73 = map[string]outcome{
	// Memfds have a class of their own.
	"others-memfd-label":  {"memory_t", "memory_t"},
	"others-memfd-denied": {"EACCES-create", "EACCES-create"},

	// 7.3 has read-write protection.
	"rwp-user-fault":                  {"served", "served"},
	"rwp-secure-user-fault":           {"create-EINVAL", "served"},
	"rwp-kernel-fault":                {"served", "served"},
	"rwp-secure-kernel-fault":         {"create-EINVAL", "served"},
	"rwp-kernel-fault-user-mode-only": {"EFAULT", "EFAULT"},
	"rwp-secure-fork":                 {"create-EINVAL", "no-event"},
	"rwp-fork":                        {"served", "served"},
	"rwp-fork-without-create":         {"EACCES-fork-hangs", "served"},
	"rwp-fork-async":                  {"no-message", "no-message"},
	"rwp-fork-descriptor-closed":      {"forked", "forked"},
}

// A point is one that the mail makes, or that follows from it.
type point struct {
	title      string
	assertions []assertion
}

// points are all assertions about the kernels. kernel/README.md shows them as a table, which TestReadme checks.
var points = []point{
	{"A userfaultfd has a labelled inode of its own", []assertion{
		{"create-allowed", "userfaultfd(2) in a domain that may create one", "fd", "fd"},
		{"create-allowed-device", "/dev/userfaultfd likewise", "fd", "fd"},
		{"create-label-by-name", "the type is that of the name-based transition", "app_uffd_t", "app_uffd_t"},
		{"create-label-by-name-device", "also through /dev/userfaultfd", "app_uffd_t", "app_uffd_t"},
		{"create-label-default", "without such a rule it is the domain's", "plain_t", "plain_t"},
		{"create-before-policy", "one from before the first policy was loaded works on", "fd", "fd"},
	}},
	{"Labelling and authorization are two hooks, and the second one still decides", []assertion{
		{"create-denied", "denied, with an AVC that names [userfaultfd]", "EACCES-create", "EACCES-create"},
		{"create-denied-device", "also through /dev/userfaultfd", "EACCES-create", "EACCES-create"},
		{"create-denied-fork-child", "the fork child's domain may not create one either", "EACCES", "EACCES"},
		{"create-permissive", "permissive: created, and logged all the same", "fd-create", "fd-create"},
		{"others-secretmem-works", "memfd_secret", "works", "works"},
		{"others-secretmem-label", "its label", "secret_t", "secret_t"},
		{"others-secretmem-denied", "denied to create", "EACCES-create", "EACCES-create"},
		{"others-io-uring-works", "io_uring_setup", "works", "works"},
		{"others-io-uring-label", "its label", "ring_t", "ring_t"},
		{"others-io-uring-denied", "denied to create", "EACCES-create", "EACCES-create"},
		{"others-guest-memfd-works", "KVM's guest_memfd", "works", "works"},
		{"others-guest-memfd-label", "its label", "gmem_t", "gmem_t"},
		{"others-guest-memfd-denied", "denied to create", "EACCES-create", "EACCES-create"},
		{"others-memfd-works", "memfd_create, which 6.12 knows as a file of tmpfs", "works", "works"},
		{"others-memfd-label", "its label", "any_t", "any_t"},
		{"others-memfd-denied", "denied to create", "fd", "fd"},
		{"others-eventfd-works", "a file of the shared inode", "works", "works"},
		{"others-eventfd-barred", "no rule is about those", "fd", "fd"},
	}},
	{"The fork child's descriptor: no authorization asked of the one who reads the event", []assertion{
		{"fork-reader-with-create", "a reader that may create one", "event", "event"},
		{"fork-reader-without-create", "one that may not, which the event is no reason for", "EACCES-fork-hangs", "event"},
		{"fork-service", "the child's fault is served through it", "served", "served"},
		{"fork-service-without-create", "likewise, by a reader that may not create one", "EACCES-fork-hangs", "served"},
		{"fork-two-descriptors", "a fork with two descriptors: two events", "2-events", "2-events"},
		{"fork-two-descriptors-without-create", "likewise, by a reader that may not create one",
			"EACCES-fork-hangs", "2-events"},
		{"ring-read", "io_uring waits for the event", "event", "event"},
		{"ring-read-late", "io_uring finds it there", "event", "event"},
		{"ring-read-worker", "a worker of io_uring reads it", "event", "event"},
		{"ring-read-without-create", "io_uring of a reader that may not create one", "EACCES-fork-hangs", "event"},
		{"ring-read-worker-without-create", "its worker", "EACCES-fork-hangs", "event"},
		{"ring-child-fault", "io_uring reads the child's fault", "fault", "fault"},
	}},
	{"Its label is the fork child's, and its flags are the parent's", []assertion{
		{"fork-label", "its type, in a domain other than the descriptor's maker", "app_uffd_t", "child_uffd_t"},
		{"fork-label-without-create", "likewise, for a reader that may not create one", "EACCES-fork-hangs", "child_uffd_t"},
		{"fork-shared-flags", "close-on-exec and O_NONBLOCK as on the parent's", "kept", "kept"},
		{"fork-shared-flags-without-create", "likewise, for a reader that may not create one", "EACCES-fork-hangs", "kept"},
		{"fork-nowait", "RWF_NOWAIT, which the parent's allows", "EOPNOTSUPP", "EAGAIN"},
		{"fork-message", "the message holds the descriptor's number and nothing else", "clean", "clean"},
	}},
	{"Reading the event is receiving a descriptor", []assertion{
		{"fork-reader-without-use", "without `fd use` on the child's domain, which an AVC says; the forker can be killed",
			"event", "EACCES-use"},
		{"fork-reader-without-read", "without `read` on the descriptor's type", "event", "EACCES-read"},
		{"fork-reader-without-any", "denied by either kernel: the event stays where it is",
			"EACCES-fork-hangs", "EACCES-fork-hangs"},
		{"ring-read-without-use", "io_uring without `fd use`", "event", "EACCES-fork-hangs"},
		{"receive-fork-event-passed-on", "passed on to a third domain without `fd use` on the child's",
			"fd", "truncated-use"},
		{"receive-socket", "SCM_RIGHTS between domains", "fd", "fd"},
		{"receive-socket-without-use", "without `fd use`", "truncated-use", "truncated-use"},
		{"receive-socket-without-read", "without `read`", "truncated-read", "truncated-read"},
		{"receive-pidfd", "pidfd_getfd between domains", "fd", "fd"},
		{"receive-pidfd-without-use", "without `fd use`", "EACCES-use", "EACCES-use"},
		{"receive-pidfd-without-read", "without `read`", "EACCES-read", "EACCES-read"},
		{"receive-pidfd-without-ptrace", "without `ptrace`", "EPERM-ptrace", "EPERM-ptrace"},
		{"receive-exec", "an exec into another domain", "fd", "fd"},
		{"receive-exec-without-read", "without `read`: closed", "null", "null"},
	}},
	{"A fork event is never lost, doubled or stuck", []assertion{
		{"fork-blocking-read", "read() that waits", "event", "event"},
		{"fork-nonblocking-read", "read() that does not: EAGAIN before and after", "event", "event"},
		{"fork-denied-then-permitted", "a denied reader, then one that may", "EACCES-event", "EACCES-event"},
		{"fork-denied-then-without-create", "a denied reader, then one that may, but not create",
			"EACCES-EACCES", "EACCES-event"},
		{"fork-denied-against-reading", "50 forks, a denied reader and a permitted one, which wait in read(): none is lost",
			"", "event"},
		{"fork-denied-against-polling", "likewise in poll()", "", "event"},
		{"fork-two-readers", "100 forks, two readers at once: one gets it", "one-each", "one-each"},
		{"fork-two-readers-without-create", "likewise, by readers that may not create one", "EACCES", "one-each"},
		{"fork-two-at-once", "two threads fork at once", "2-events", "2-events"},
		{"fork-short-buffer", "a buffer too small, then a large one", "EINVAL-event", "EINVAL-event"},
		{"fork-full-table", "no free descriptor, then one", "EMFILE-event", "EMFILE-event"},
		{"fork-bad-buffer", "nowhere to put the message: the fork goes on", "EFAULT-forked", "EFAULT-forked"},
		{"fork-descriptor-closed", "the last descriptor closed: the fork goes on", "forked", "forked"},
		{"fork-child-descriptor-closed",
			"the child's descriptor closed while the forker waits as in vfork(): the child goes on", "released", "released"},
		{"fork-denied-reader-dies", "the denied reader killed, no other: the fork goes on", "EACCES-forked", "EACCES-forked"},
		{"fork-forker-dies", "the forker killed: the event is gone", "killed", "killed"},
	}},
	{"The child's file is made at fork", []assertion{
		{"fork-file-max", "no file for the forker: its fork fails, the next one is fine", "event", "ENOMEM-event"},
	}},
	{"UFFD_SECURE", []assertion{
		{"secure-syscall", "userfaultfd(2)", "EINVAL", "fd"},
		{"secure-device", "/dev/userfaultfd", "EINVAL", "fd"},
		{"secure-user-mode-only", "with UFFD_USER_MODE_ONLY", "EINVAL", "fd"},
		{"secure-shared-flags", "close-on-exec and O_NONBLOCK as asked for", "create-EINVAL", "kept"},
		{"secure-unknown-flags-syscall", "every other flag is refused, with it and without", "EINVAL", "EINVAL"},
		{"secure-unknown-flags-device", "also by /dev/userfaultfd", "EINVAL", "EINVAL"},
		{"secure-label", "its label", "create-EINVAL", "app_uffd_t"},
		{"secure-barred", "a domain that may create none", "EINVAL", "EACCES"},
		{"secure-user-fault", "a fault of a program is served", "create-EINVAL", "served"},
		{"secure-user-fault-device", "likewise, made by /dev/userfaultfd", "create-EINVAL", "served"},
		{"secure-kernel-fault", "a fault of the kernel is served", "create-EINVAL", "served"},
	}},
	{"UFFD_SECURE has no fork events", []assertion{
		{"secure-fork-event-syscall", "UFFDIO_API refuses UFFD_FEATURE_EVENT_FORK", "create-EINVAL", "api-EINVAL"},
		{"secure-fork-event-device", "likewise, made by /dev/userfaultfd", "create-EINVAL", "api-EINVAL"},
		{"secure-fork-event-unprivileged", "without CAP_SYS_PTRACE the same", "create-EINVAL", "api-EINVAL"},
		{"secure-features-syscall", "and does not offer it, unlike all others", "create-EINVAL", "hidden"},
		{"secure-features-device", "likewise, made by /dev/userfaultfd", "create-EINVAL", "hidden"},
		{"secure-features-plain", "a plain descriptor offers it", "offered", "offered"},
		{"secure-fork", "a fork makes no event and does not wait", "create-EINVAL", "no-event"},
	}},
	{"vm.unprivileged_userfaultfd can demand UFFD_SECURE (plain / UFFD_USER_MODE_ONLY / UFFD_SECURE)", []assertion{
		{"sysctl-0-privileged-syscall", "0, with CAP_SYS_PTRACE", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-0-privileged-device", "0, with it, /dev/userfaultfd", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-0-unprivileged-syscall", "0, without it", "EPERM/fd/EPERM", "EPERM/fd/EPERM"},
		{"sysctl-0-unprivileged-device", "0, without it, /dev/userfaultfd", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-1-privileged-syscall", "1, with CAP_SYS_PTRACE", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-1-privileged-device", "1, with it, /dev/userfaultfd", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-1-unprivileged-syscall", "1, without it", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-1-unprivileged-device", "1, without it, /dev/userfaultfd", "fd/fd/EINVAL", "fd/fd/fd"},
		{"sysctl-2-privileged-syscall", "2, with CAP_SYS_PTRACE", "EINVAL", "fd/fd/fd"},
		{"sysctl-2-privileged-device", "2, with it, /dev/userfaultfd", "EINVAL", "fd/fd/fd"},
		{"sysctl-2-unprivileged-syscall", "2, without it", "EINVAL", "EPERM/EPERM/fd"},
		{"sysctl-2-unprivileged-device", "2, without it, /dev/userfaultfd", "EINVAL", "EPERM/EPERM/fd"},
		{"sysctl-2-namespace-root", "2, root of a user namespace of its own", "EINVAL", "EPERM/EPERM/fd"},
		{"sysctl-2-both-flags", "2, UFFD_SECURE with UFFD_USER_MODE_ONLY", "EINVAL", "fd"},
		{"sysctl-2-kept", "2 is what is read back", "EINVAL", "2"},
		{"sysctl-3", "3 is refused", "EINVAL", "EINVAL"},
		{"sysctl-negative", "so is -1", "EINVAL", "EINVAL"},
	}},
	{"Read-write protection, new in 7.3, is no way around any of this", []assertion{
		{"rwp-user-fault", "a program's access to a protected page", "api-EINVAL", "api-EINVAL"},
		{"rwp-secure-user-fault", "likewise, with UFFD_SECURE", "create-EINVAL", "api-EINVAL"},
		{"rwp-kernel-fault", "the kernel's", "api-EINVAL", "api-EINVAL"},
		{"rwp-secure-kernel-fault", "likewise, with UFFD_SECURE", "create-EINVAL", "api-EINVAL"},
		{"rwp-kernel-fault-user-mode-only", "with UFFD_USER_MODE_ONLY: not handled", "api-EINVAL", "api-EINVAL"},
		{"rwp-set-mode", "UFFDIO_SET_MODE switches no other feature, fork events among them", "EINVAL", "EINVAL"},
		{"rwp-secure-set-mode", "likewise, with UFFD_SECURE", "create-EINVAL", "EINVAL"},
		{"rwp-secure-fork", "a fork with UFFD_SECURE: no event, a free child", "create-EINVAL", "api-EINVAL"},
		{"rwp-fork", "the fork child's access is served through its descriptor", "api-EINVAL", "api-EINVAL"},
		{"rwp-fork-without-create", "likewise, by a reader that may not create one", "api-EINVAL", "api-EINVAL"},
		{"rwp-fork-async", "asynchronous when the fork began: so is the child's", "api-EINVAL", "api-EINVAL"},
		{"rwp-fork-descriptor-closed", "the last one closed: the fork and the child go on", "api-EINVAL", "api-EINVAL"},
	}},
}

// own are the kernel's own tests. They are part of the series, so the stock kernel does not have them.
var own = point{"The tests in the series itself", []assertion{
	{"selftest-uffd-secure", "tools/testing/selftests/mm/uffd-secure", "", "passed"},
	{"selftest-uffd-fork", "tools/testing/selftests/selinux/uffd_fork, with its own policy beside this one", "", "passed"},
}}

// underStress are the assertions for the debug kernel alone, besides all of the above. Its splats fail the boot by
// themselves.
var underStress = point{"Nothing breaks under stress (debug kernel)", []assertion{
	{"stress-fail-fork", "each allocation of a fork with two descriptors fails once", "", "clean"},
	{"stress-fail-read", "each allocation of reading a fork event fails once; the event stays", "", "clean"},
	{"stress-fail-create", "each allocation of userfaultfd(2) fails once", "", "clean"},
	{"stress-kill-race", "20 s of killing a forker and its readers at random moments", "", "clean"},
	{"stress-kmemleak", "no memory is lost in any of these tests", "", "clean"},
}}
