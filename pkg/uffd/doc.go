// SPDX-License-Identifier: Apache-2.0

// Package uffd is userfaultfd(2) for Go, without cgo: descriptors, ranges, filling pages, events.
//
// In the way of one page fault through this program it is the first step and the last: [UFFD.Read]
// takes the fault from the kernel, [UFFD.Copy] puts the page in and wakes the thread that waits.
//
// A userfaultfd belongs to the address space of the process that made it, which need not be the
// process that reads it: all addresses here are numbers in that other address space, never pointers.
// Take care that no Go thread touches memory that its own process registered: the garbage collector
// may stop the very goroutine that would have to answer the fault.
//
// A descriptor's life:
//
//	Open or FromFD ──► API (once) ──► Register ──► Read / Copy / … ──► Unregister ──► Close
//
// Copy, Zeropage, Continue, Poison, WriteProtect, Wake and Read do not allocate, also not when they
// fail with an error that the kernel is documented to give: such errors are made once (errors.go).
//
// # Supervision
//
// Who holds a userfaultfd decides what a process finds in its memory. Open therefore makes it with UFFD_SECURE where
// the kernel has that flag, which comes with this project's series (kernel/patches) and is in no released Linux;
// [UFFD.Supervision] says whether that was so or whether SELinux labels the descriptor anyway. With the flag, forks
// are not reported. Without FeatureEventFork a forked process's copy of the memory is registered with nothing: of private
// memory it sees zeros where pages are missing; of shared memory, too, and they are then in everybody's, as if they had been
// put there. Such memory must be MADV_DONTFORK, as QEMU's guest RAM is; a forked process does not have it then.
//
// Sources: userfaultfd(2), ioctl_userfaultfd(2), the kernel's fs/userfaultfd.c and mm/userfaultfd.c.
package uffd
