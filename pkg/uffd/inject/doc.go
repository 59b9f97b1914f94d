// SPDX-License-Identifier: Apache-2.0

// Package inject takes a userfaultfd from a process that does not co-operate.
//
// A userfaultfd belongs to the address space of the process that created it, so the process itself must make the
// system call. QEMU does not make it, so we make its main thread do it:
//
//  1. thread.go    one OS thread of ours becomes the tracer; ptrace(2) is bound to it
//  2. process.go   Seize: PTRACE_SEIZE, PTRACE_INTERRUPT, wait until the thread is stopped
//  3. call.go      Syscall: set registers, run one `syscall` instruction of the C library, put everything back
//     (code.go, frame_amd64.go: the thread can restore itself; rseq.go: restartable sequences;
//     seccomp.go: whether a filter would kill the process for the call)
//  4. take.go      Take: userfaultfd(2) or ioctl(/dev/userfaultfd), then pidfd_getfd(2) gives us a duplicate
//  5. remote.go    Duplicate, CloseRemote: a later daemon takes and closes the process' own descriptor
//
// # What the traced thread may notice
//
// It loses time. Registers, signal mask, pending signals, a system call in progress and a stop by SIGSTOP stay as they
// were. The exception are calls that Linux cannot continue after a stop with the time that was left, such as epoll_wait
// with a finite timeout (see eintrCalls): they wait for their whole timeout again.
//
// # If the daemon is killed half-way
//
// When a tracer dies, the kernel lets its tracee continue with the registers that it has. Between setting and restoring
// them (a fraction of a millisecond), these are ours. So we write a signal frame below the thread's stack, as the
// kernel does for a signal handler, with all registers, vector state and signal mask. The instruction after our system
// call is a `ret` into the code by which signal handlers return (rt_sigreturn(2)). The thread then makes our call, if
// it has not yet, and restores itself. It may notice one thing: a wait that counts the time left (nanosleep, poll with
// a timeout) ends with EINTR. The result of the call stays: a descriptor, or a page of 4 KiB that [Hand] has mapped.
// The kernel kills a process with a shadow stack (CET) at that `ret`.
//
// # If the registers cannot be restored
//
// The thread stays stopped. We try again for as long as the process and this program run (ErrNotRestored).
//
// # The tracer and wait(2)
//
// A tracer's stops are events for wait(2) in every thread of the tracer's process. If the traced process is our child
// and a goroutine is in [os/exec.Cmd.Wait] for it, that Wait returns early with a 'stopped' status. The parent must
// therefore poll(2) a pidfd for the end of the process and only then call Wait. This package does not depend on these
// events: it asks ptrace whether the thread is stopped.
package inject
