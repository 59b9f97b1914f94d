// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrInterrupted is what Wait gives after Interrupt.
var ErrInterrupted = errors.New("userfaultfd: waiting was interrupted")

// Waiter waits until a userfaultfd has a message, and can be told to stop waiting, which a blocking
// Read cannot. It holds an eventfd of its own.
type Waiter struct {
	u    *UFFD
	wake *os.File
}

// NewWaiter makes a Waiter for u, which must be non-blocking, have made its handshake, and outlive it.
func NewWaiter(u *UFFD) (*Waiter, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &Waiter{u: u, wake: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// Wait returns nil when a Read is likely to find a message: another reader, or a Copy, may be faster. It
// occupies an operating system thread while it waits, which makes it quicker than the runtime's
// poller. Close of the userfaultfd during a Wait takes effect after Interrupt.
//
// The death of the process is not a message: watch a pidfd for it.
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
		case err == unix.EINTR: // a signal to this thread; the runtime sends them to preempt goroutines
			continue
		case err != nil:
			return fmt.Errorf("userfaultfd: poll: %w", err)
		case fds[1].Revents != 0:
			return ErrInterrupted
		case fds[0].Revents&unix.POLLERR != 0:
			// fs/userfaultfd.c, userfaultfd_poll: the only two reasons.
			return fmt.Errorf("%w: the descriptor is blocking or had no API handshake", opPoll.err(unix.EINVAL))
		}
		return nil
	}
}

// Interrupt makes this and every later Wait return ErrInterrupted.
func (w *Waiter) Interrupt() error {
	one := [8]byte{1, 1, 1, 1, 1, 1, 1, 1} // any number but 0, in any byte order
	if _, err := w.wake.Write(one[:]); err != nil && !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("userfaultfd: interrupt: %w", err)
	}
	return nil
}

// Close frees the eventfd. Interrupt first if a Wait may be under way. The userfaultfd stays open.
func (w *Waiter) Close() error { return w.wake.Close() }
