// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// The values of Taken.Method and Attempt.Method.
const (
	MethodSyscall   = "userfaultfd(2)"
	MethodDevice    = uffd.DevicePath
	MethodDuplicate = "duplicate" // the process had the userfaultfd already
)

// newFlags are the flags of a new userfaultfd, besides UFFD_SECURE. UFFD_USER_MODE_ONLY is missing: KVM takes a guest's
// faults in kernel mode, and that flag would turn them into a guest crash.
const newFlags = unix.O_CLOEXEC | unix.O_NONBLOCK

// TakeOptions says what Take may use.
type TakeOptions struct {
	// HandDevice passes dev, our open /dev/userfaultfd, to the process, which runs meanwhile. Take finds the
	// descriptor number there by itself. release makes the process close it; Take calls it once, whether or not it got
	// a userfaultfd. Take owns dev. If HandDevice is nil, Take does not use the device.
	//
	// With QEMU use getfd and closefd. After add-fd and remove-fd the device stays open for as long as the VM
	// does not run (monitor_fdset_cleanup in QEMU 7.2).
	HandDevice func(ctx context.Context, dev *os.File) (release func(context.Context) error, err error)
}

// Taken is a userfaultfd of another process. The two descriptors are one file: registered memory stays registered
// while either is open.
type Taken struct {
	UFFD     *uffd.UFFD // our duplicate, owned by the owner of Taken; call UFFD.API first (not after Duplicate)
	RemoteFD int        // the process' own descriptor, open until CloseRemote
	Pid      int
	Method   string
}

// Attempt is a failed attempt to make a userfaultfd: how, and why it failed.
type Attempt struct {
	Method string
	Err    error
}

// TakeError lists all attempts of Take. errors.Is and errors.As look at the error of each.
type TakeError struct {
	Pid      int
	Attempts []Attempt
}

func (e *TakeError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "take a userfaultfd from process %d:", e.Pid)
	for i, a := range e.Attempts {
		if i > 0 {
			b.WriteByte(';')
		}
		fmt.Fprintf(&b, " %s: %v", a.Method, a.Err)
	}
	return b.String()
}

// Unwrap returns the attempts' errors.
func (e *TakeError) Unwrap() []error {
	errs := make([]error, len(e.Attempts))
	for i, a := range e.Attempts {
		errs[i] = a.Err
	}
	return errs
}

// Take makes process pid create a userfaultfd for its memory, with UFFD_SECURE where the kernel has that flag, and
// returns a duplicate. It tries userfaultfd(2) first. If the process may not call it (it is unprivileged, and
// vm.unprivileged_userfaultfd is 0), Take uses /dev/userfaultfd, which opts.HandDevice passes to the process. Every
// error is a *TakeError. After an error the process has no more descriptors than before, unless the error says that one
// could not be closed.
func Take(ctx context.Context, pid int, opts TakeOptions) (*Taken, error) {
	failed := &TakeError{Pid: pid}
	pidfd, err := openPidfd(pid)
	if err != nil {
		failed.Attempts = append(failed.Attempts, Attempt{MethodSyscall, err})
		return nil, failed
	}
	defer unix.Close(pidfd)
	target := target{pid: pid, pidfd: pidfd}

	taken, err := target.take(ctx, MethodSyscall, unix.SYS_USERFAULTFD, newFlags)
	if err == nil {
		return taken, nil
	}
	failed.Attempts = append(failed.Attempts, Attempt{MethodSyscall, err})
	if !refused(err) {
		return nil, failed // no ptrace, or process gone: the device would fail, too
	}
	taken, err = target.takeByDevice(ctx, opts)
	if err == nil {
		return taken, nil
	}
	failed.Attempts = append(failed.Attempts, Attempt{MethodDevice, err})
	return nil, failed
}

// refusal says that the kernel or a filter refused to make a userfaultfd.
type refusal struct {
	cause  error
	remedy string
}

func (r *refusal) Error() string { return fmt.Sprintf("refused (%v): %s", r.cause, r.remedy) }
func (r *refusal) Unwrap() error { return r.cause }

func refused(err error) bool {
	var r *refusal
	return errors.As(err, &r)
}

// target is the process of one Take. pidfd identifies it, even if pid is given to another process.
type target struct{ pid, pidfd int }

func openPidfd(pid int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		err = ErrProcessGone
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd_open of process %d: %w", pid, err)
	}
	return pidfd, nil
}

// seize is Seize for the process of pidfd.
func (t target) seize(ctx context.Context) (*Process, error) {
	p, err := Seize(ctx, t.pid)
	if err != nil {
		return nil, err
	}
	// While we trace it, the number cannot be given to another process. It might have been given away before.
	if err := unix.PidfdSendSignal(t.pidfd, 0, nil, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("process %d: %w", t.pid, ErrProcessGone), p.Detach())
	}
	return p, nil
}

// take seizes the process, makes it create a userfaultfd by the given call, duplicates that and detaches. The call's
// last argument is the flags.
func (t target) take(ctx context.Context, method string, nr uintptr, args ...uintptr) (*Taken, error) {
	p, err := t.seize(ctx)
	if err != nil {
		return nil, err
	}
	own := uffd.FromSecureFD
	secure := slices.Clone(args)
	secure[len(secure)-1] |= abi.UFFD_SECURE
	remote, err := uintptr(0), error(unix.EINVAL)
	if uffd.AsksSecure() {
		remote, err = p.Syscall(ctx, nr, secure...)
	}
	if errors.Is(err, unix.EINVAL) { // the kernel does not have UFFD_SECURE, or AsksSecure said no
		own = uffd.FromFD
		remote, err = p.Syscall(ctx, nr, args...)
	}
	if errors.Is(err, ErrNotRestored) && remote != 0 { // it was made, and the thread cannot close it now
		err = fmt.Errorf("descriptor %d stays open in process %d: %w", remote, t.pid, err)
	}
	if err != nil {
		return nil, both(t.explain(method, err), p.Detach())
	}
	local, err := t.duplicate(int(remote))
	if err != nil {
		// Do not use the caller's context: it may have ended, and the descriptor must be closed.
		_, closeErr := p.Syscall(context.WithoutCancel(ctx), unix.SYS_CLOSE, remote)
		if closeErr != nil {
			closeErr = fmt.Errorf("descriptor %d stays open in process %d: %w", remote, t.pid, closeErr)
		}
		return nil, both(both(err, closeErr), p.Detach())
	}
	taken := &Taken{UFFD: own(local), RemoteFD: int(remote), Pid: t.pid, Method: method}
	if err := p.Detach(); err != nil { // killed after the call: its memory is gone
		return nil, errors.Join(err, taken.UFFD.Close())
	}
	return taken, nil
}

// explain adds the remedy to the error that the process got.
func (t target) explain(method string, err error) error {
	switch {
	case errors.Is(err, ErrSeccomp):
		return &refusal{err, "allow " + method + " in that filter"}
	case errors.Is(err, unix.ENOSYS) && method == MethodSyscall:
		return &refusal{err, "the kernel has no userfaultfd (CONFIG_USERFAULTFD), or a seccomp filter hides it"}
	case errors.Is(err, unix.EACCES):
		return &refusal{forbidden(t.pid, "create a userfaultfd", err), "its policy must allow it"}
	case errors.Is(err, unix.EPERM):
		st, statErr := readStatus(t.pid)
		who := "the process"
		if statErr == nil {
			who = fmt.Sprintf("the process (uid %d, seccomp mode %d)", st.uid, st.seccomp)
		}
		return &refusal{err, who + " has no CAP_SYS_PTRACE and vm.unprivileged_userfaultfd is not 1, " +
			"or its seccomp filter or a security module refuses; use " + uffd.DevicePath}
	}
	return err
}

// duplicate returns our duplicate of the process' descriptor fd, if that is a userfaultfd.
func (t target) duplicate(fd int) (int, error) {
	if err := checkUserfault(t.pid, fd); err != nil {
		return -1, err
	}
	local, err := unix.PidfdGetfd(t.pidfd, fd, 0) // is close-on-exec
	if errors.Is(err, unix.EACCES) {
		err = forbidden(os.Getpid(), "receive that process' userfaultfd", err)
	}
	if err != nil {
		return -1, fmt.Errorf("pidfd_getfd of descriptor %d of process %d: %w", fd, t.pid, err)
	}
	return local, nil
}

// takeByDevice uses /dev/userfaultfd. Only opening it needs permission; the process' ioctl needs none.
func (t target) takeByDevice(ctx context.Context, opts TakeOptions) (taken *Taken, err error) {
	if opts.HandDevice == nil {
		return nil, errors.New("not tried: there is no way to hand the process a descriptor (no QMP connection)")
	}
	dev, err := os.OpenFile(uffd.DevicePath, os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w: it needs Linux 6.1 or newer; with an older one start the VM with CAP_SYS_PTRACE or "+
			"set vm.unprivileged_userfaultfd=1", err)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("%w: give the daemon's user access to it", err)
	case err != nil:
		return nil, err
	}
	defer dev.Close()

	release, err := opts.HandDevice(ctx, dev)
	if err != nil {
		return nil, fmt.Errorf("hand it to process %d: %w", t.pid, err)
	}
	defer func() {
		releaseErr := release(context.WithoutCancel(ctx))
		if releaseErr == nil {
			return
		}
		releaseErr = fmt.Errorf("take it out of process %d again: %w", t.pid, releaseErr)
		if taken != nil { // with the device still open, the process could make more userfaultfds: give up
			releaseErr = errors.Join(releaseErr, taken.CloseRemote(context.WithoutCancel(ctx)), taken.UFFD.Close())
		}
		taken, err = nil, errors.Join(err, releaseErr)
	}()
	remoteDev, err := findFile(t.pid, dev)
	if err != nil {
		return nil, err
	}
	return t.take(ctx, MethodDevice, unix.SYS_IOCTL, uintptr(remoteDev), abi.USERFAULTFD_IOC_NEW, newFlags)
}
