// SPDX-License-Identifier: Apache-2.0

// Package uffd is userfaultfd(2) for Go, without cgo: descriptors, ranges, filling pages, events.
//
// It is the first and the last step of a page fault's way through this program: [UFFD.Read] takes the
// fault from the kernel; [UFFD.Copy] installs the page and wakes the thread that waits.
//
// A userfaultfd belongs to the address space of the process that made it. Another process may read it:
// all addresses here are numbers in that address space, never pointers.
// No Go thread may touch memory that its own process registered: the garbage collector
// may stop the goroutine that has to answer the fault.
//
// A descriptor's life:
//
//	Open or FromFD ──► API (once) ──► Register ──► Read / Copy / … ──► Unregister ──► Close
//
// Copy, Zeropage, Continue, Poison, WriteProtect, RWProtect, Wake, Read and Scan do not allocate, nor do their
// documented errors: each is made once (errors.go).
//
// # What a process touches
//
// [UFFD.RWProtect] protects pages against access and leaves them in memory (Linux 7.3). [Pagemap.Scan] then finds the
// pages that were accessed since, in private memory, shared memory and hugetlbfs. That is the working set, without a
// message for each access. [UFFD.WriteProtect] with FeatureWPAsync does it for writes (Linux 6.7). See the example.
//
// # Supervision
//
// The holder of a userfaultfd decides what a process finds in its memory. Open makes descriptors that a security module
// can control, where the kernel supports that: see [Supervision].
//
// Sources: userfaultfd(2), ioctl_userfaultfd(2), PAGEMAP_SCAN(2const), the kernel's
// mm/userfaultfd.c, fs/proc/task_mmu.c and, in 6.12, fs/userfaultfd.c.
package uffd
