// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Outcome is one way a userfaultfd operation can end other than well. errors.Is finds both the
// outcome and its errno: an error that is ErrExist is unix.EEXIST too.
type Outcome struct {
	errno error // a unix.Errno, kept as an interface so that Unwrap does not make one
	text  string
}

func (o *Outcome) Error() string { return o.text }

// Unwrap gives the unix.Errno.
func (o *Outcome) Unwrap() error { return o.errno }

// The outcomes the kernel is documented to give. Where one errno means different things to different
// operations, the text says what it may mean; what to do is in the comment.
var (
	// ErrExist: a page is there already. Its content is somebody else's and stays; call Wake for it,
	// because the kernel did not.
	ErrExist = &Outcome{unix.EEXIST, "the page is already there"}

	// ErrAgain: the address space is changing (a fork, mremap or discard has an event that nobody has read
	// yet), or the kernel stopped after part of the work. Read events, then repeat what is left.
	ErrAgain = &Outcome{unix.EAGAIN, "the address space is changing, repeat what is left"}

	// ErrWouldBlock: Read on a non-blocking descriptor found no message.
	ErrWouldBlock = &Outcome{unix.EAGAIN, "no message is waiting"}

	// ErrNotRegistered: the range is not, or no longer, registered with this descriptor, or not in one
	// piece of memory: it was unmapped, moved or unregistered.
	ErrNotRegistered = &Outcome{unix.ENOENT, "the range is not registered with this userfaultfd"}

	// ErrProcessGone: the process the descriptor belongs to has exited.
	ErrProcessGone = &Outcome{unix.ESRCH, "the process the userfaultfd belongs to is gone"}

	// ErrNoSpace: no room in the backing store. Kernels 4.11 and 4.12 said this for a process that is gone.
	ErrNoSpace = &Outcome{unix.ENOSPC, "no space in what backs the memory (or, before Linux 4.13, the process is gone)"}

	// ErrNoMemory: no page could be had (cgroup or tmpfs limit, no free huge page). Register and
	// Unregister say this also for a process that is gone.
	ErrNoMemory = &Outcome{unix.ENOMEM, "no page could be had, or the process is gone"}

	// ErrPermission: see the operation; to Register it means memory the process may not write.
	ErrPermission = &Outcome{unix.EPERM, "not permitted"}

	// ErrInvalid: misaligned or empty range, a mode the memory's kind does not support, or no API
	// handshake yet.
	ErrInvalid = &Outcome{unix.EINVAL, "invalid: misaligned or empty range, a mode this memory does not support, or API was not called"}

	// ErrFault: the source of a Copy is unreadable, or the destination lies beyond the end of its file.
	ErrFault = &Outcome{unix.EFAULT, "unreadable source, or the page lies beyond the end of its file"}

	// ErrBusy: the range is registered with another userfaultfd, or (Move) a page is pinned or shared.
	ErrBusy = &Outcome{unix.EBUSY, "registered with another userfaultfd, or a page is in use"}
)

// outcomes is every outcome an ioctl can have. ErrWouldBlock is read(2)'s meaning of EAGAIN.
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

// Unwrap gives Err.
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

// operation has the errors of one operation ready, so that failing does not allocate.
type operation struct {
	name   string
	closed error
	byErr  [unix.EDEADLK]error // indexed by errno; the documented ones are all below EDEADLK
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

// filled interprets the two answers of the ioctls that fill pages: the errno, and the field into which the
// kernel writes either the bytes done or a negative errno. n is what was done, also with an error.
//
//	errno   field    meaning
//	0       n        all done
//	EAGAIN  n > 0    partly done, and what was done is woken
//	EAGAIN  0        the address space is changing (kernels that leave the field alone)
//	e       -e       failed, nothing done; the field is the more precise of the two
//	ESRCH   0        the process is gone (the field is left alone)
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
