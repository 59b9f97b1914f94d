// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Range is memory in the address space that a userfaultfd belongs to. Both numbers are bytes and must
// be multiples of the page size (of the huge page's, where the memory is hugetlbfs).
type Range struct {
	Start, Len uint64
}

// End is the address after the range.
func (r Range) End() uint64 { return r.Start + r.Len }

func (r Range) String() string { return fmt.Sprintf("[%#x, %#x)", r.Start, r.End()) }

// UFFD owns one userfaultfd descriptor. Every method may be called from several goroutines at once.
//
// There is no finalizer: who opens it closes it. If the last copy of a userfaultfd closes while memory is
// registered, the kernel wakes all waiting threads and missing pages read as zeros from then on.
type UFFD struct {
	fd int

	// state counts the calls that are using fd; the bit closing says that Close was called.
	// After that the count only falls, and the one who brings it to zero closes the descriptor,
	// so that no call can meet the same number given to another file.
	state atomic.Int64

	// secure: it is known to be made with UFFD_SECURE.
	secure atomic.Bool
}

const closing = 1 << 62

// FromFD takes ownership of fd, which must be a userfaultfd.
func FromFD(fd int) *UFFD { return &UFFD{fd: fd} }

// FromSecureFD is FromFD for a descriptor that is known to be made with UFFD_SECURE.
func FromSecureFD(fd int) *UFFD {
	u := FromFD(fd)
	u.secure.Store(true)
	return u
}

// FD is the descriptor's number, for poll(2) or SCM_RIGHTS; it stays owned by u and is -1 after Close.
func (u *UFFD) FD() int {
	if u.state.Load()&closing != 0 {
		return -1
	}
	return u.fd
}

// Close closes the descriptor, at the latest when calls that are under way have returned; it does not
// wait for them nor interrupt a blocking Read (see [Waiter] for one that can be). Closing again
// does nothing. Calls made afterwards fail with [os.ErrClosed].
func (u *UFFD) Close() error {
	for {
		s := u.state.Load()
		if s&closing != 0 {
			return nil
		}
		if u.state.CompareAndSwap(s, s|closing) {
			if s == 0 {
				return u.closeFD()
			}
			return nil
		}
	}
}

// acquire keeps the descriptor open until release. It says false after Close.
func (u *UFFD) acquire() bool {
	for {
		s := u.state.Load()
		if s&closing != 0 {
			return false
		}
		if u.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

func (u *UFFD) release() {
	if u.state.Add(-1) == closing {
		_ = u.closeFD()
	}
}

func (u *UFFD) closeFD() error {
	if err := unix.Close(u.fd); err != nil {
		return fmt.Errorf("close userfaultfd %d: %w", u.fd, err)
	}
	return nil
}
