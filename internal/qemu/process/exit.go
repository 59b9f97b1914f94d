// SPDX-License-Identifier: Apache-2.0

package process

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoExit means that the kernel does not report the exit status of a process that is no child. Linux does since 6.15
// (PIDFD_GET_INFO with PIDFD_INFO_EXIT, ioctl_pidfd(2)).
var ErrNoExit = errors.New("the kernel does not say how it ended; Linux 6.15 does")

// reapPause is the interval at which Status polls a process that has ended until its parent has waited for it.
const reapPause = 10 * time.Millisecond

// An Exit waits for the exit status of a process that need not be a child of this one. Close it when done.
type Exit struct{ process *Handle }

// Exit opens an Exit of the process, which must be alive.
func (i Identity) Exit() (*Exit, error) {
	h, err := Open(i.PID)
	if err != nil {
		return nil, err
	}
	if err := i.Check(); err != nil { // it may have ended, and h may refer to another process
		return nil, errors.Join(err, h.Close())
	}
	return &Exit{h}, nil
}

// Status waits until the process has ended and its parent has waited for it, and returns its exit status. The error is
// ErrNoExit, or the cause of ctx's end.
func (x *Exit) Status(ctx context.Context) (unix.WaitStatus, error) {
	if err := x.process.Wait(ctx); err != nil {
		return 0, err
	}
	for {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
		if err := unix.IoctlPidfdInfo(int(x.process.pidfd.Fd()), &info); err != nil {
			return 0, fmt.Errorf("%w: %w", ErrNoExit, err)
		}
		if info.Mask&unix.PIDFD_INFO_EXIT != 0 {
			return unix.WaitStatus(info.Exit_code), nil
		}
		select {
		case <-time.After(reapPause):
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// Close releases the process. It does not affect the process itself.
func (x *Exit) Close() error { return x.process.Close() }
