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

// anonName is the name of a userfaultfd in /proc (fs/userfaultfd.c).
const anonName = "anon_inode:[userfaultfd]"

// selectFDs returns the descriptor numbers of process pid for which wanted returns true, in ascending order.
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

// findFile returns the lowest descriptor number of process pid that is open on the same file as f.
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

// Duplicate returns a duplicate of a userfaultfd that process pid has already, as descriptor fd. The process need not
// be stopped. A daemon that was restarted in mid-migration uses it to continue: UFFD.API has been called on that
// descriptor already, and it cannot be seen whether it was made with UFFD_SECURE.
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
	if err := sameFile(pid, fd, local); err != nil { // the process closed it meanwhile and reused the number
		return nil, errors.Join(err, unix.Close(local))
	}
	return &Taken{UFFD: uffd.FromFD(local), RemoteFD: fd, Pid: pid, Method: MethodDuplicate}, nil
}

// CloseRemote makes the process close its own descriptor. It first checks that the number still means the
// same userfaultfd as t.UFFD, which must be open for that. ErrNotUserfault: the number now means something
// else, and nothing was closed.
func (t *Taken) CloseRemote(ctx context.Context) error {
	return closeRemote(ctx, t.Pid, t.RemoteFD, func() error { return sameFile(t.Pid, t.RemoteFD, t.UFFD.FD()) })
}

// CloseRemote makes process pid close its descriptor fd. It first checks that fd is a userfaultfd
// (ErrNotUserfault: it is not, and nothing was closed). Taken.CloseRemote is stricter: it also detects
// another userfaultfd with the same number.
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

// sameFile checks that descriptor fd of process pid and our descriptor local are the same file, by inode. Since Linux
// 5.12 each userfaultfd has its own inode. Before, all share one, and sameFile accepts any of them.
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
