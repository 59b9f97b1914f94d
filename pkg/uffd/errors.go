// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Outcome is one documented way in which a userfaultfd operation can fail. errors.Is finds both the
// outcome and its errno: an error that is ErrExist is unix.EEXIST, too.
type Outcome struct {
	errno error // a unix.Errno, kept as an interface so that Unwrap does not make one
	text  string
}

func (o *Outcome) Error() string { return o.text }

// Unwrap returns the unix.Errno.
func (o *Outcome) Unwrap() error { return o.errno }

// The outcomes that the kernel documents. Where one errno has several meanings, the text of the error lists
// them. The comments say what to do.
var (
	// ErrExist: a page is there already, and its content stays. Call Wake for it, because the kernel did not
	// wake the threads that wait.
	ErrExist = &Outcome{unix.EEXIST, "the page is already there"}

	// ErrAgain: the address space is changing (the event of a fork, mremap or discard was not read
	// yet), or the kernel stopped after part of the work. Read events, then repeat the rest.
	ErrAgain = &Outcome{unix.EAGAIN, "the address space is changing, repeat what is left"}

	// ErrWouldBlock: Read on a non-blocking descriptor found no message.
	ErrWouldBlock = &Outcome{unix.EAGAIN, "no message is waiting"}

	// ErrNotRegistered: the range is not registered with this descriptor, or does not lie in one mapping.
	// It may have been unmapped, moved or unregistered.
	ErrNotRegistered = &Outcome{unix.ENOENT, "the range is not registered with this userfaultfd"}

	// ErrProcessGone: the process the descriptor belongs to has exited.
	ErrProcessGone = &Outcome{unix.ESRCH, "the process the userfaultfd belongs to is gone"}

	// ErrNoSpace: no room in the backing store. Linux 4.11 and 4.12 also return it if the process is gone.
	ErrNoSpace = &Outcome{unix.ENOSPC, "no space in what backs the memory (or, before Linux 4.13, the process is gone)"}

	// ErrNoMemory: no page could be allocated (cgroup or tmpfs limit, no free huge page). Register and
	// Unregister also return it if the process is gone. In Linux 7.3, Copy also returns it beyond the end of a file.
	ErrNoMemory = &Outcome{unix.ENOMEM, "no page could be had, or the process is gone"}

	// ErrPermission: see the operation. From Register, it means memory that the process may not write.
	ErrPermission = &Outcome{unix.EPERM, "not permitted"}

	// ErrInvalid: a misaligned or empty range, a mode that this kind of memory does not support, or no API
	// handshake yet.
	ErrInvalid = &Outcome{unix.EINVAL,
		"invalid: misaligned or empty range, a mode this memory does not support, or API was not called"}

	// ErrFault: the source of a Copy is unreadable, or the destination lies beyond the end of its file (not in Linux
	// 7.3, see ErrNoMemory).
	ErrFault = &Outcome{unix.EFAULT, "unreadable source, or the page lies beyond the end of its file"}

	// ErrBusy: the range is registered with another userfaultfd, or (Move) a page is pinned or shared.
	ErrBusy = &Outcome{unix.EBUSY, "registered with another userfaultfd, or a page is in use"}
)

// outcomes are all outcomes of ioctls. ErrWouldBlock is missing: it is what EAGAIN means for read(2).
var outcomes = []*Outcome{
	ErrExist, ErrAgain, ErrNotRegistered, ErrProcessGone, ErrNoSpace, ErrNoMemory,
	ErrPermission, ErrInvalid, ErrFault, ErrBusy,
}

// OpError says which operation had which outcome.
type OpError struct {
	Op  string // the kernel's name: "UFFDIO_COPY", "read", …
	Err error  // an *Outcome, os.ErrClosed, or a bare unix.Errno that no documentation mentions
}

func (e *OpError) Error() string { return "userfaultfd: " + e.Op + ": " + describe(e.Err) }

// Unwrap returns Err.
func (e *OpError) Unwrap() error { return e.Err }

// describe adds the errno's name to an outcome's text.
func describe(err error) string {
	var o *Outcome
	var errno unix.Errno
	if errors.As(err, &o) && errors.As(err, &errno) {
		return fmt.Sprintf("%s (%s)", o.text, unix.ErrnoName(errno))
	}
	return err.Error()
}

// operation holds the errors of one operation. They are made once, so that a failure does not allocate.
type operation struct {
	name   string
	closed error
	byErr  [unix.EDEADLK]error // indexed by errno; all documented errnos are below EDEADLK
}

func newOperation(name string) *operation {
	op := &operation{name: name, closed: &OpError{name, os.ErrClosed}}
	for _, o := range outcomes {
		op.set(o)
	}
	return op
}

func (op *operation) set(o *Outcome) {
	//nolint:errorlint // an Outcome holds a bare errno
	op.byErr[o.errno.(unix.Errno)] = &OpError{op.name, o}
}

// err turns an errno into the error to return; 0 is nil.
func (op *operation) err(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	if int(errno) < len(op.byErr) && op.byErr[errno] != nil {
		return op.byErr[errno]
	}
	return &OpError{op.name, errno}
}

// filled interprets the two results of an ioctl that fills pages: the errno, and the field into which the
// kernel writes either the number of bytes filled or a negative errno. n is in bytes, and valid with an error, too.
//
//	errno   field    meaning
//	0       n        all done
//	EAGAIN  n > 0    partly done; threads that wait for the filled pages were woken
//	EAGAIN  0        the address space is changing (these kernels do not write the field)
//	e       -e       failed, nothing done; the field is more precise than the errno
//	ESRCH   0        the process is gone (the kernel does not write the field)
func (op *operation) filled(errno unix.Errno, field int64) (n int, err error) {
	switch {
	case errno == 0:
		return int(field), nil
	case field > 0:
		return int(field), op.err(errno)
	case field < 0:
		return 0, op.err(unix.Errno(-field))
	}
	return 0, op.err(errno)
}
