// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qmp"
)

const (
	// closeTimeout bounds what Close asks of QEMU.
	closeTimeout = 2 * time.Second
	// quitPatience is how long Quit waits for QEMU to end by itself.
	quitPatience = 2 * time.Second
)

// VM is a running QEMU. Close it when done; the QEMU goes on.
type VM struct {
	QMP *qmp.Client
	Pid int // in our PID namespace

	pidfd *os.File // refers to that process even when its number is used again
	heap  heapSearch

	shutdowns *qmp.Subscription
	endingMu  sync.Mutex // guards ending
	ending    *Ending    // the last that shutdowns had

	restore *Settings // what PrepareIncoming changed; nil: nothing

	domain *libvirt.Domain // nil: it is none of libvirt's
}

// Attach connects to the QMP socket at path and finds the QEMU behind it. Errors of the connection are
// those of qmp.Dial. The path may be the address of a VM of libvirt's.
func Attach(ctx context.Context, path string) (*VM, error) {
	if libvirt.IsAddress(path) {
		return attachDomain(ctx, path)
	}
	client, err := qmp.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	pid, err := findPid(ctx, client)
	if err != nil {
		return nil, errors.Join(err, client.Disconnect())
	}
	vm, err := attach(client, pid)
	if err != nil {
		return nil, errors.Join(err, client.Disconnect())
	}
	return vm, nil
}

func attachDomain(ctx context.Context, address string) (*VM, error) {
	domain, err := libvirt.Open(ctx, address)
	if err != nil {
		return nil, err
	}
	client, pid, err := domain.Monitor(ctx, processOf)
	if err != nil {
		return nil, errors.Join(err, domain.Close())
	}
	vm, err := attach(client, pid)
	if err != nil {
		return nil, errors.Join(err, client.Disconnect(), domain.Close())
	}
	vm.domain = domain
	return vm, nil
}

// attach takes over a connection to the QEMU that is a process, unless it fails.
func attach(client *qmp.Client, pid int) (*VM, error) {
	vm := &VM{QMP: client, Pid: pid, shutdowns: client.Subscribe("SHUTDOWN")}
	var err error
	if vm.pidfd, err = openPidfd(vm.Pid); err != nil {
		return nil, err
	}
	if client.Err() != nil { // else the process that has the number is the one that answers
		return nil, errors.Join(client.Err(), vm.pidfd.Close())
	}
	return vm, nil
}

// Close disconnects, after it has put back the migration settings that were changed: QEMU's own migrations are to be as
// they were.
func (vm *VM) Close() error {
	var err error
	if vm.restore != nil && vm.QMP.Err() == nil {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		if err = vm.apply(ctx, *vm.restore); err != nil {
			err = fmt.Errorf("put back QEMU's migration settings: %w", err)
		}
		var gone *qmp.DisconnectedError
		if errors.As(err, &gone) {
			err = nil // QEMU ended, and its settings with it
		}
	}
	err = errors.Join(err, vm.QMP.Disconnect(), vm.pidfd.Close())
	if vm.domain != nil {
		err = errors.Join(err, vm.domain.Close())
	}
	return err
}

// WaitExit returns nil when the process has ended, child or not.
func (vm *VM) WaitExit(ctx context.Context) error {
	if err := waitExit(ctx, vm.pidfd); err != nil {
		return fmt.Errorf("QEMU, process %d: %w", vm.Pid, err)
	}
	return nil
}

// Alive says whether the process has not ended; the error is of errors.Is(err, unix.ESRCH) if it has.
func (vm *VM) Alive() error {
	raw, err := vm.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var gone error
	if err := raw.Control(func(fd uintptr) { gone = unix.PidfdSendSignal(int(fd), 0, nil, 0) }); err != nil {
		return err
	}
	if gone != nil && !errors.Is(gone, unix.EPERM) {
		return fmt.Errorf("QEMU, process %d: %w", vm.Pid, gone)
	}
	return nil
}

// Ended says whether the process has, also where its parent has not waited for it yet. Of a VM that was closed it is not
// known, and false.
func (vm *VM) Ended() bool {
	raw, err := vm.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	_ = raw.Control(func(fd uintptr) { // else it is closed
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0) // readable when all of its threads have ended (pidfd_open(2))
		ended = err == nil && n > 0
		if !ended { // its number is its own yet, and its memory gone when its first thread has ended
			_, err := vm.Identity()
			ended = errors.Is(err, errEnded)
		}
	})
	return ended
}

// openPidfd refers to a process in a way that waitExit can wait for.
func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open of QEMU, process %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid)), nil
}

// duplicate is another descriptor of the same file.
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

// waitExit returns when the process of a pidfd has ended, or with ctx's error.
func waitExit(ctx context.Context, pidfd *os.File) error {
	pidfd, err := duplicate(pidfd) // with a deadline of its own: others may wait, too
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

// Quit ends QEMU and returns when its process is gone. One whose main loop hangs, on a page that will not
// come for instance, is killed. The error may be a libvirt.ErrOwner: then it has ended.
func (vm *VM) Quit(ctx context.Context) error {
	if vm.domain != nil {
		err := vm.domain.Destroy(ctx)
		if (err == nil || errors.Is(err, libvirt.ErrOwner)) && vm.WaitExit(ctx) == nil {
			return err
		}
	}
	polite, cancel := context.WithTimeoutCause(ctx, quitPatience, fmt.Errorf("QEMU did not obey quit within %v", quitPatience))
	defer cancel()
	err := vm.QMP.Do(polite, "quit", nil, nil)
	var gone *qmp.DisconnectedError
	if err == nil || errors.As(err, &gone) {
		if vm.WaitExit(polite) == nil {
			return nil
		}
	}
	if err := killPidfd(vm.pidfd); err != nil {
		return fmt.Errorf("kill QEMU, process %d: %w", vm.Pid, err)
	}
	return vm.WaitExit(ctx)
}

// killPidfd kills the process of a pidfd; one that has ended is no error.
func killPidfd(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var killErr error
	if err := raw.Control(func(fd uintptr) { killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(killErr, unix.ESRCH) {
		return nil
	}
	return killErr
}
