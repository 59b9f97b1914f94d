// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// anonName is how /proc names a userfaultfd (fs/userfaultfd.c).
const anonName = "anon_inode:[userfaultfd]"

// Find lists the descriptor numbers under which process pid holds userfaultfds, in ascending order.
func Find(pid int) ([]int, error) {
	return selectFDs(pid, func(fd int) bool { return checkUserfault(pid, fd) == nil })
}

func selectFDs(pid int, wanted func(fd int) bool) ([]int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, fmt.Errorf("descriptors of process %d: %w", pid, err)
	}
	var fds []int
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && wanted(fd) {
			fds = append(fds, fd)
		}
	}
	slices.Sort(fds)
	return fds, nil
}

// findFile returns the number of a descriptor of process pid that is open on the same file as f.
func findFile(pid int, f *os.File) (int, error) {
	fds, err := selectFDs(pid, func(fd int) bool { return sameFile(pid, fd, int(f.Fd())) == nil })
	if err != nil {
		return -1, err
	}
	if len(fds) == 0 {
		return -1, fmt.Errorf("process %d has not got the %s that was handed to it", pid, f.Name())
	}
	return fds[0], nil
}

// Duplicate takes a userfaultfd that process pid holds already, one of those from Find. The process need not be
// stopped. A daemon that was restarted in mid-migration continues with it; UFFD.API has been called on it then, and
// whether it was made with UFFD_SECURE is not to be seen.
func Duplicate(pid, fd int) (*Taken, error) {
	pidfd, err := openPidfd(pid)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	local, err := target{pid, pidfd}.duplicate(fd)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: %w: %s", ErrPtraceDenied, err, deniedRemedy())
	}
	if err != nil {
		return nil, err
	}
	if err := sameFile(pid, fd, local); err != nil { // the process closed it in between and reused the number
		return nil, errors.Join(err, unix.Close(local))
	}
	return &Taken{UFFD: uffd.FromFD(local), RemoteFD: fd, Pid: pid, Method: MethodDuplicate}, nil
}

// CloseRemote makes the process close its own descriptor, after checking that the number still stands for the
// same userfaultfd as t.UFFD, which therefore has to be open. ErrNotUserfault: the number now means something
// else; nothing is closed.
func (t *Taken) CloseRemote(ctx context.Context) error {
	return closeRemote(ctx, t.Pid, t.RemoteFD, func() error { return sameFile(t.Pid, t.RemoteFD, t.UFFD.FD()) })
}

// CloseRemote makes process pid close its descriptor fd, after checking that it is a userfaultfd
// (ErrNotUserfault: it is not, and nothing is closed). With a Taken at hand use its method, which also notices
// another userfaultfd under the same number.
func CloseRemote(ctx context.Context, pid, fd int) error {
	return closeRemote(ctx, pid, fd, func() error { return nil })
}

func closeRemote(ctx context.Context, pid, fd int, same func() error) (err error) {
	p, err := Seize(ctx, pid)
	if err != nil {
		return fmt.Errorf("close descriptor %d of process %d: %w", fd, pid, err)
	}
	defer func() { err = both(err, p.Detach()) }()
	if err := checkUserfault(pid, fd); err != nil {
		return err
	}
	if err := same(); err != nil {
		return err
	}
	if _, err := p.Syscall(ctx, unix.SYS_CLOSE, uintptr(fd)); err != nil {
		return fmt.Errorf("close descriptor %d of process %d: %w", fd, pid, err)
	}
	return nil
}

func checkUserfault(pid, fd int) error {
	name, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotUserfault, err)
	}
	if name != anonName {
		return fmt.Errorf("descriptor %d of process %d is %s: %w", fd, pid, name, ErrNotUserfault)
	}
	return nil
}

// sameFile compares inodes. Each userfaultfd has its own since Linux 5.12; before that all look alike and this
// accepts any of them.
func sameFile(pid, fd, local int) error {
	var theirs, ours unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", pid, fd), &theirs); err != nil {
		return fmt.Errorf("descriptor %d of process %d: %w", fd, pid, err)
	}
	if err := unix.Fstat(local, &ours); err != nil {
		return fmt.Errorf("our own descriptor %d: %w", local, err)
	}
	if theirs.Dev != ours.Dev || theirs.Ino != ours.Ino {
		return fmt.Errorf("descriptor %d of process %d is another file than ours: %w", fd, pid, ErrNotUserfault)
	}
	return nil
}
