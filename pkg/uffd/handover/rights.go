// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// scmMaxFD is the kernel's limit of descriptors per message (SCM_MAX_FD): with room for them, none is cut off.
const scmMaxFD = 253

// rights owns the descriptors that arrived.
type rights struct {
	fds []int
}

// add takes the descriptors that came with one recvmsg(2). It takes all of them before it checks anything, so that
// close closes them after an error.
func (r *rights) add(control []byte, flags int) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return fmt.Errorf("%w: control message: %w", ErrInvalid, err)
	}
	var other bool
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			other = true
			continue
		}
		r.fds = append(r.fds, fds...)
	}
	switch {
	case flags&unix.MSG_CTRUNC != 0:
		return fmt.Errorf("the kernel could not give us the descriptor (MSG_CTRUNC): this process has too many open, " +
			"or a security module refused it")
	case other:
		return fmt.Errorf("%w: a control message that is not SCM_RIGHTS", ErrInvalid)
	case len(r.fds) > 1:
		return fmt.Errorf("%w: %d descriptors, want one", ErrInvalid, len(r.fds))
	}
	return nil
}

// take checks that the one descriptor is a userfaultfd, makes it non-blocking and returns it. The caller then owns it.
func (r *rights) take() (int, error) {
	if len(r.fds) != 1 {
		return -1, fmt.Errorf("%w: no descriptor came with it", ErrInvalid)
	}
	fd := r.fds[0]
	target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return -1, fmt.Errorf("identify the descriptor: %w", err)
	}
	if target != "anon_inode:[userfaultfd]" {
		return -1, fmt.Errorf("%w: the descriptor is %q, not a userfaultfd", ErrInvalid, target)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return -1, fmt.Errorf("make the userfaultfd non-blocking: %w", err)
	}
	r.fds = nil
	return fd, nil
}

// close closes the descriptors that were not taken.
func (r *rights) close() {
	for _, fd := range r.fds {
		_ = unix.Close(fd)
	}
	r.fds = nil
}
