// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// The methods in this file fill missing pages. Each stops at the first page that it cannot fill. n is how many bytes
// are in place, also when err is not nil. The threads that wait for these bytes are woken, unless the mode says
// DontWake. On ErrAgain, repeat the rest.
//
//	ErrExist          the first page is there already: Wake it, continue with the next
//	ErrAgain          the address space is changing: read events, repeat the rest
//	ErrNotRegistered  the range was unmapped, moved or unregistered
//	ErrProcessGone    nobody is left to fill pages for

// CopyMode modifies Copy.
type CopyMode uint64

const (
	// CopyDontWake leaves waiting threads asleep until Wake.
	CopyDontWake CopyMode = abi.UFFDIO_COPY_MODE_DONTWAKE

	// CopyWriteProtect installs the page write-protected; the range must be registered with ModeWP.
	CopyWriteProtect CopyMode = abi.UFFDIO_COPY_MODE_WP
)

var opCopy = newOperation("UFFDIO_COPY")

// Copy installs a copy of src at dst. Each page appears to the threads there as a whole. len(src) and dst must be
// multiples of the page size. The caller keeps src. n is how many bytes were installed, also when err is not nil.
func (u *UFFD) Copy(dst uint64, src []byte, mode CopyMode) (n int, err error) {
	if !u.acquire() {
		return 0, opCopy.closed
	}
	field, errno := copyFrom(u.fd, dst, src, mode)
	u.release()
	return opCopy.filled(errno, field)
}

// CopyRecord is UFFDIO_COPY's struct: CopyRecorded has the kernel write its answer there. In memory that outlives the
// process (CopyRecords of a mapped file), the record says afterwards what the last copy did, however the process ended:
// a process that is killed while the kernel copies does not end before the kernel has written the answer.
//
// Only one goroutine may use a record at a time.
type CopyRecord struct {
	arg abi.UffdioCopy
}

// CopyRecordSize is the size of a CopyRecord in bytes.
const CopyRecordSize = 40

// Answer returns what the last copy did: n bytes at dst are in place. exists is true if the first page was there
// before the copy. If n is 0 and exists is false, either nothing was done, or it is unknown what was done, because the
// kernel could not write the answer.
func (r *CopyRecord) Answer() (dst, n uint64, exists bool) {
	answer := atomic.LoadInt64(&r.arg.Copy)
	return atomic.LoadUint64(&r.arg.Dst), uint64(max(0, answer)), answer == -int64(unix.EEXIST)
}

// Landed records that n bytes are in place at the page that the last copy found there. A caller that writes that page
// by other means calls Landed before anybody can use the content.
func (r *CopyRecord) Landed(n uint64) { atomic.StoreInt64(&r.arg.Copy, int64(n)) }

// CopyRecorded is Copy with the kernel's answer in r.
func (u *UFFD) CopyRecorded(r *CopyRecord, dst uint64, src []byte, mode CopyMode) (n int, err error) {
	if !u.acquire() {
		return 0, opCopy.closed
	}
	field, errno := recordedFrom(u.fd, r, dst, src, mode)
	u.release()
	return opCopy.filled(errno, field)
}

// ZeroMode modifies Zeropage.
type ZeroMode uint64

// ZeroDontWake leaves waiting threads asleep until Wake.
const ZeroDontWake ZeroMode = abi.UFFDIO_ZEROPAGE_MODE_DONTWAKE

var opZeropage = newOperation("UFFDIO_ZEROPAGE")

// Zeropage makes r read as zeros without a copy. hugetlbfs does not support it (ErrInvalid): Copy zeros there.
func (u *UFFD) Zeropage(r Range, mode ZeroMode) (n int, err error) {
	if !u.acquire() {
		return 0, opZeropage.closed
	}
	arg := abi.UffdioZeropage{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_ZEROPAGE, &arg)
	u.release()
	return opZeropage.filled(errno, arg.Zeropage)
}

// ContinueMode modifies Continue.
type ContinueMode uint64

const (
	// ContinueDontWake leaves waiting threads asleep until Wake.
	ContinueDontWake ContinueMode = abi.UFFDIO_CONTINUE_MODE_DONTWAKE

	// ContinueWriteProtect maps the page write-protected; the range must be registered with ModeWP (Linux 6.4).
	ContinueWriteProtect ContinueMode = abi.UFFDIO_CONTINUE_MODE_WP
)

var opContinue = newOperation("UFFDIO_CONTINUE")

// Continue answers minor faults: it maps the pages of r that are in the page cache already. ErrFault: a page is
// not in the page cache.
func (u *UFFD) Continue(r Range, mode ContinueMode) (n int, err error) {
	if !u.acquire() {
		return 0, opContinue.closed
	}
	arg := abi.UffdioContinue{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_CONTINUE, &arg)
	u.release()
	return opContinue.filled(errno, arg.Mapped)
}

// PoisonMode modifies Poison.
type PoisonMode uint64

// PoisonDontWake leaves waiting threads asleep until Wake.
const PoisonDontWake PoisonMode = abi.UFFDIO_POISON_MODE_DONTWAKE

var opPoison = newOperation("UFFDIO_POISON")

// Poison marks the missing pages of r as lost: access to one gives SIGBUS, as memory with a hardware error
// does (Linux 6.6, FeaturePoison). A later Copy can still install a page there.
func (u *UFFD) Poison(r Range, mode PoisonMode) (n int, err error) {
	if !u.acquire() {
		return 0, opPoison.closed
	}
	arg := abi.UffdioPoison{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_POISON, &arg)
	u.release()
	return opPoison.filled(errno, arg.Updated)
}

// MoveMode modifies Move.
type MoveMode uint64

const (
	// MoveDontWake leaves waiting threads asleep until Wake.
	MoveDontWake MoveMode = abi.UFFDIO_MOVE_MODE_DONTWAKE

	// MoveAllowHoles skips pages that are missing at src, instead of failing with ErrNotRegistered.
	MoveAllowHoles MoveMode = abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
)

var opMove = newOperation("UFFDIO_MOVE")

// Move moves the pages of [src, src+length) to dst without a copy (Linux 6.8, FeatureMove). It works
// only on private anonymous memory, and only within the calling process: a descriptor of another
// process gives ErrInvalid. ErrBusy: a page is pinned or shared with a forked child.
func (u *UFFD) Move(dst, src, length uint64, mode MoveMode) (n int, err error) {
	if !u.acquire() {
		return 0, opMove.closed
	}
	arg := abi.UffdioMove{Dst: dst, Src: src, Len: length, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_MOVE, &arg)
	u.release()
	return opMove.filled(errno, arg.Move)
}
