// SPDX-License-Identifier: Apache-2.0

// Package inject obtains a userfaultfd from a process that knows nothing of us.
//
// A userfaultfd belongs to the address space of the process that created it, so the process itself must make the
// system call. QEMU will not, so we make its main thread do it:
//
//  1. thread.go    one OS thread of ours becomes the tracer; ptrace(2) is bound to it
//  2. process.go   Seize: PTRACE_SEIZE, PTRACE_INTERRUPT, wait until the thread is stopped
//  3. call.go      Syscall: set registers, run one `syscall` instruction of the vDSO, put everything back
//     (rseq.go: restartable sequences; seccomp.go: would a filter kill the process for it?)
//  4. take.go      Take: userfaultfd(2) or ioctl(/dev/userfaultfd), then pidfd_getfd(2) gives us a duplicate
//  5. remote.go    Find, Duplicate, CloseRemote: what a later daemon does with the process' own copy
//
// # What the traced thread may notice
//
// Nothing but time. Registers, signal mask, pending signals, a system call that was in progress and a stop by SIGSTOP
// are all as before. The one exception are calls that Linux itself cannot continue after a stop with the time
// that was left (epoll_wait with a finite timeout, for one, see eintrCalls): they wait their timeout once more.
//
// # If the daemon is killed half-way
//
// Between setting and restoring registers (a fraction of a millisecond) a dead tracer would let the thread run on
// with our registers, which can only end in silent damage. For just that time PTRACE_O_EXITKILL is set: the kernel
// kills the process instead.
//
// # The tracer and wait(2)
//
// A tracer's stops are events for wait(2) in every thread of the tracer's process. If the traced process is a
// child of ours and some goroutine is in [os/exec.Cmd.Wait] for it, that Wait returns early with a 'stopped' status. Who
// starts the process must poll(2) a pidfd for its end and only then call Wait. This package itself does not
// depend on those events: it asks ptrace whether the thread is stopped.
package inject
