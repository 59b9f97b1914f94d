// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"
	"sync/atomic"
)

// Range is memory in the address space that a userfaultfd belongs to. Start and Len are in bytes and
// multiples of the page size (in hugetlbfs, of the huge page size).
type Range struct {
	Start, Len uint64
}

// End is the address after the range.
func (r Range) End() uint64 { return r.Start + r.Len }

func (r Range) String() string { return fmt.Sprintf("[%#x, %#x)", r.Start, r.End()) }

// UFFD owns one userfaultfd descriptor. Every method may be called from several goroutines at once.
//
// There is no finalizer: the caller must Close it. If the last copy of a userfaultfd closes while memory is
// registered, the kernel wakes all waiting threads, and missing pages read as zeros from then on.
type UFFD struct {
	descriptor

	// secure is true if the descriptor is known to be made with UFFD_SECURE.
	secure atomic.Bool
}

// FromFD takes ownership of fd, which must be a userfaultfd.
func FromFD(fd int) *UFFD { return &UFFD{descriptor: descriptor{fd: fd}} }

// FromSecureFD is FromFD for a descriptor that is known to be made with UFFD_SECURE.
func FromSecureFD(fd int) *UFFD {
	u := FromFD(fd)
	u.secure.Store(true)
	return u
}

// FD is the descriptor's number, for poll(2) or SCM_RIGHTS. u still owns the descriptor. FD is -1 after Close.
func (u *UFFD) FD() int {
	if u.closed() {
		return -1
	}
	return u.fd
}

// Close closes the descriptor once the calls that are under way have returned. It does not wait for them
// and does not interrupt a blocking Read ([Waiter] waits and can be interrupted). A second Close
// does nothing. Later calls of other methods fail with [os.ErrClosed].
func (u *UFFD) Close() error { return u.close() }
