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
	MethodDuplicate = "duplicate" // the process had it already
)

// newFlags of a new userfaultfd, besides UFFD_SECURE. Not UFFD_USER_MODE_ONLY: KVM takes a guest's faults in kernel mode, and such a
// descriptor turns them into a guest crash.
const newFlags = unix.O_CLOEXEC | unix.O_NONBLOCK

// TakeOptions says what Take may use.
type TakeOptions struct {
	// HandDevice passes dev, our open /dev/userfaultfd, into the process, which runs meanwhile; Take finds its
	// number there by itself. release takes it out again; Take calls it once, whether or not it got a
	// userfaultfd. dev belongs to Take. nil: the process cannot be handed descriptors.
	//
	// With QEMU use getfd and closefd. After add-fd and remove-fd the device stays open for as long as the VM
	// does not run (monitor_fdset_cleanup in QEMU 7.2).
	HandDevice func(ctx context.Context, dev *os.File) (release func(context.Context) error, err error)
}

// Taken is a userfaultfd of another process. The two descriptors are one file: what is registered stays so
// while either is open.
type Taken struct {
	UFFD     *uffd.UFFD // our duplicate, owned by the holder of Taken; before anything else it needs UFFD.API
	RemoteFD int        // the process' own, kept open until CloseRemote
	Pid      int
	Method   string
}

// Attempt is one way in which a userfaultfd was asked for, and why that failed.
type Attempt struct {
	Method string
	Err    error
}

// TakeError lists all that Take tried. errors.Is and errors.As look at each attempt's error.
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

// Unwrap gives the attempts' errors.
func (e *TakeError) Unwrap() []error {
	errs := make([]error, len(e.Attempts))
	for i, a := range e.Attempts {
		errs[i] = a.Err
	}
	return errs
}

// Take makes process pid create a userfaultfd for its memory, with UFFD_SECURE where the kernel has that, and
// returns a duplicate. It tries userfaultfd(2)
// first; where the process may not call it (unprivileged, and vm.unprivileged_userfaultfd is 0) it uses
// /dev/userfaultfd, which opts.HandDevice puts into the process. Every error is a *TakeError; then the process
// has no more descriptors than before, unless the error says that one could not be closed.
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
		return nil, failed // no ptrace, or process gone: the other way needs both too
	}
	taken, err = target.takeByDevice(ctx, opts)
	if err == nil {
		return taken, nil
	}
	failed.Attempts = append(failed.Attempts, Attempt{MethodDevice, err})
	return nil, failed
}

// refusal is the answer of a kernel or a filter that would not make a userfaultfd.
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

// target is the process of one Take. pidfd keeps its number from meaning another process.
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

// seize is Seize for exactly the process of pidfd.
func (t target) seize(ctx context.Context) (*Process, error) {
	p, err := Seize(ctx, t.pid)
	if err != nil {
		return nil, err
	}
	// While we trace it, the number cannot be given to another process any more; but it might have been before.
	if err := unix.PidfdSendSignal(t.pidfd, 0, nil, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("process %d: %w", t.pid, ErrProcessGone), p.Detach())
	}
	return p, nil
}

// take seizes the process, makes it create a userfaultfd by the given call, whose last argument is the flags,
// duplicates that and lets go.
func (t target) take(ctx context.Context, method string, nr uintptr, args ...uintptr) (*Taken, error) {
	p, err := t.seize(ctx)
	if err != nil {
		return nil, err
	}
	own := uffd.FromSecureFD
	secure := slices.Clone(args)
	secure[len(secure)-1] |= abi.UFFD_SECURE
	remote, err := p.Syscall(ctx, nr, secure...)
	if errors.Is(err, unix.EINVAL) { // the kernel does not know the flag
		own = uffd.FromFD
		remote, err = p.Syscall(ctx, nr, args...)
	}
	if err != nil {
		return nil, both(t.explain(method, err), p.Detach())
	}
	local, err := t.duplicate(int(remote))
	if err != nil {
		// Not with the caller's context: it may be over, and a descriptor must not stay behind.
		_, closeErr := p.Syscall(context.WithoutCancel(ctx), unix.SYS_CLOSE, remote)
		if closeErr != nil {
			closeErr = fmt.Errorf("descriptor %d stays open in process %d: %w", remote, t.pid, closeErr)
		}
		return nil, both(both(err, closeErr), p.Detach())
	}
	taken := &Taken{UFFD: own(local), RemoteFD: int(remote), Pid: t.pid, Method: method}
	if err := p.Detach(); err != nil { // killed after the call: there is no memory left to serve
		return nil, errors.Join(err, taken.UFFD.Close())
	}
	return taken, nil
}

// explain adds the remedy to what the process was answered.
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
		return &refusal{err, who + " has no CAP_SYS_PTRACE and vm.unprivileged_userfaultfd is not 1, or its seccomp filter or " +
			"a security module refuses; use " + uffd.DevicePath}
	}
	return err
}

// duplicate makes a descriptor of ours from one of the process', if that is a userfaultfd.
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

// takeByDevice uses /dev/userfaultfd: its ioctl asks for no capability, opening it did.
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
		if taken != nil { // a device left behind lets the process make more userfaultfds: not what was asked for
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
