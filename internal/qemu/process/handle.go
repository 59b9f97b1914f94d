// SPDX-License-Identifier: Apache-2.0

package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Handle refers to one process, even after its PID has been reused (pidfd_open(2)). Any goroutine may use it. Close
// it when done.
type Handle struct {
	pid   int
	pidfd *os.File
}

// Open returns a Handle of the process that has this PID now.
func Open(pid int) (*Handle, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open of QEMU, process %d: %w", pid, err)
	}
	return &Handle{pid, os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid))}, nil
}

// PID returns the process's PID in this process's PID namespace. It may be reused once the parent has waited for the
// process.
func (h *Handle) PID() int { return h.pid }

// Close releases the Handle. It does not affect the process.
func (h *Handle) Close() error { return h.pidfd.Close() }

// signal sends a signal; number 0 only checks. refused is the kernel's answer, err means that the Handle was closed.
func (h *Handle) signal(number unix.Signal) (refused, err error) {
	raw, err := h.pidfd.SyscallConn()
	if err != nil {
		return nil, err
	}
	err = raw.Control(func(fd uintptr) { refused = unix.PidfdSendSignal(int(fd), number, nil, 0) })
	return refused, err
}

// Alive returns nil while the process runs. When it has ended, errors.Is(err, unix.ESRCH) holds.
func (h *Handle) Alive() error {
	gone, err := h.signal(0)
	if err != nil {
		return err
	}
	if gone != nil && !errors.Is(gone, unix.EPERM) {
		return fmt.Errorf("QEMU, process %d: %w", h.pid, gone)
	}
	return nil
}

// Ended reports whether the process has ended, even when its parent has not waited for it yet. After Close it returns
// false, because the state is not known.
func (h *Handle) Ended() bool {
	raw, err := h.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	_ = raw.Control(func(fd uintptr) { // fails only when closed
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0) // readable when all of its threads have ended (pidfd_open(2))
		ended = err == nil && n > 0
		if !ended { // the PID is still its own; its memory is gone once its first thread has ended
			_, err := Identify(h.pid)
			ended = errors.Is(err, errZombie)
		}
	})
	return ended
}

// Kill sends SIGKILL to the process and does not wait for its end. It returns nil if the process has ended already.
func (h *Handle) Kill() error {
	refused, err := h.signal(unix.SIGKILL)
	if err != nil || errors.Is(refused, unix.ESRCH) {
		return err
	}
	return refused
}

// Descriptor duplicates descriptor number of the process (pidfd_getfd(2)). The caller closes fd.
func (h *Handle) Descriptor(number int) (fd int, err error) {
	return unix.PidfdGetfd(int(h.pidfd.Fd()), number, 0)
}

// Wait returns nil when the process has ended, child or not. If ctx ends first, the error wraps the cause.
func (h *Handle) Wait(ctx context.Context) error {
	pidfd, err := duplicate(h.pidfd) // a deadline of its own: other goroutines may wait, too
	if err != nil {
		return err
	}
	defer pidfd.Close()
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = pidfd.SetReadDeadline(time.Unix(1, 0)) // fails only when closed, and then Read fails too
		close(expired)
	})
	var pollErr error
	// A pidfd becomes readable when its process ends (pidfd_open(2)).
	err = conn.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			pollErr = err
			return true
		}
		return n > 0
	})
	if !stop() {
		<-expired
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("it has not ended: %w", context.Cause(ctx))
	}
	return errors.Join(err, pollErr)
}

// duplicate returns another descriptor of the same open file. The caller closes it.
func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	if err := raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), dupErr)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
