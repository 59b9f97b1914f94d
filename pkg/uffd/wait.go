// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrInterrupted is the error of Wait after Interrupt.
var ErrInterrupted = errors.New("userfaultfd: waiting was interrupted")

// Waiter waits until a userfaultfd has a message. Unlike a blocking Read, it can be interrupted. It owns an
// eventfd for that.
type Waiter struct {
	u    *UFFD
	wake *os.File
}

// NewWaiter makes a Waiter for u. u must be non-blocking, have made its handshake, and outlive the Waiter.
func NewWaiter(u *UFFD) (*Waiter, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &Waiter{u: u, wake: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// Wait returns nil when a Read is likely to find a message. Another reader may take it first, or a Copy may answer
// it. Wait occupies an operating system thread, which makes it faster than the runtime's
// poller. If the userfaultfd is closed during a Wait, it stays open until Interrupt.
//
// The death of the process gives no message: watch a pidfd for it.
func (w *Waiter) Wait() error {
	if !w.u.acquire() {
		return opPoll.closed
	}
	defer w.u.release()
	raw, err := w.wake.SyscallConn()
	if err != nil {
		return err
	}
	var waitErr error
	if err := raw.Control(func(wake uintptr) { waitErr = pollEither(w.u.fd, int(wake)) }); err != nil {
		return fmt.Errorf("userfaultfd: poll: waiter: %w", err)
	}
	return waitErr
}

var opPoll = newOperation("poll")

func pollEither(fd, wake int) error {
	fds := [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds[:], -1)
		switch {
		case err == unix.EINTR: // a signal to this thread; the runtime sends signals to preempt goroutines
			continue
		case err != nil:
			return fmt.Errorf("userfaultfd: poll: %w", err)
		case fds[1].Revents != 0:
			return ErrInterrupted
		case fds[0].Revents&unix.POLLERR != 0:
			// These are the only two reasons (fs/userfaultfd.c, userfaultfd_poll).
			return fmt.Errorf("%w: the descriptor is blocking or had no API handshake", opPoll.err(unix.EINVAL))
		}
		return nil
	}
}

// Interrupt makes the Wait that is under way and every later Wait return ErrInterrupted.
func (w *Waiter) Interrupt() error {
	one := [8]byte{1, 1, 1, 1, 1, 1, 1, 1} // not 0, in either byte order
	if _, err := w.wake.Write(one[:]); err != nil && !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("userfaultfd: interrupt: %w", err)
	}
	return nil
}

// Close closes the eventfd. Call Interrupt first if a Wait may be under way. The userfaultfd stays open.
func (w *Waiter) Close() error { return w.wake.Close() }
