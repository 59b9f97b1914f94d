// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Offsets in bytes in Hand's page of what the injected calls read and write.
const (
	pairAt    = 0   // int[2], of socketpair(2)
	byteAt    = 16  // the byte that is sent with the descriptor
	vectorAt  = 32  // struct iovec
	messageAt = 64  // struct msghdr
	controlAt = 128 // struct cmsghdr with one int
	pageSize  = 4096
)

// errTakenOut says that the message came without its descriptor. The kernel removes a descriptor that a security module
// does not let the process have (scm_detach_fds in net/core/scm.c).
var errTakenOut = errors.New("the kernel took it out of the message")

// Hand gives process pid a duplicate of f and returns its number there. The duplicate is close-on-exec; CloseHanded
// closes it. The caller keeps f. File names, file permissions and namespaces do not matter: the process makes a pair of
// sockets, this process takes one end (pidfd_getfd(2)) and sends f through it (SCM_RIGHTS, unix(7)), and the process
// receives it. Nothing else is left in the process. Errors are those of Seize and of the process' calls. ErrForbidden:
// a security module does not let the process have the file.
func Hand(ctx context.Context, pid int, f *os.File) (fd int, err error) {
	wrap := func(err error) error { return fmt.Errorf("hand %s to process %d: %w", f.Name(), pid, err) }
	pidfd, err := openPidfd(pid)
	if err != nil {
		return -1, wrap(err)
	}
	defer unix.Close(pidfd)
	t := target{pid: pid, pidfd: pidfd}
	p, err := t.seize(ctx)
	if err != nil {
		return -1, wrap(err)
	}
	fd, err = p.receive(ctx, t, f)
	if err = both(err, p.Detach()); err != nil {
		return -1, wrap(err)
	}
	return fd, nil
}

// receive makes the process receive f. If it fails, it undoes its changes in the process.
func (p *Process) receive(ctx context.Context, t target, f *os.File) (fd int, err error) {
	undo := func(nr uintptr, args ...uintptr) { // not with ctx, which may have ended
		_, undoErr := p.Syscall(context.WithoutCancel(ctx), nr, args...)
		err = both(err, undoErr)
	}
	none := ^uintptr(0)
	page, err := p.Syscall(ctx, unix.SYS_MMAP, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, none, 0)
	if err != nil {
		return -1, fmt.Errorf("mmap: %w", err)
	}
	defer func() { undo(unix.SYS_MUNMAP, page, pageSize) }()
	_, err = p.Syscall(ctx, unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0, page+pairAt)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	pair, err := p.peek(page+pairAt, 8)
	if err != nil {
		return -1, err
	}
	ours, theirs := uintptr(binary.NativeEndian.Uint32(pair)), uintptr(binary.NativeEndian.Uint32(pair[4:]))
	defer func() { undo(unix.SYS_CLOSE, ours); undo(unix.SYS_CLOSE, theirs) }()
	if err := send(t.pidfd, int(ours), f); err != nil {
		return -1, err
	}
	if err := p.poke(page, messageOf(page)); err != nil {
		return -1, err
	}
	_, err = p.Syscall(ctx, unix.SYS_RECVMSG, theirs, page+messageAt, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return -1, fmt.Errorf("recvmsg: %w", err)
	}
	control, err := p.peek(page+controlAt, unix.CmsgSpace(4))
	if err != nil {
		return -1, err
	}
	if size := binary.NativeEndian.Uint64(control); size != uint64(unix.CmsgLen(4)) {
		return -1, forbidden(t.pid, "receive that file", errTakenOut)
	}
	return int(binary.NativeEndian.Uint32(control[unix.CmsgLen(0):])), nil
}

// send sends f through a socket of the process.
func send(pidfd, socket int, f *os.File) error {
	local, err := unix.PidfdGetfd(pidfd, socket, 0)
	if err != nil {
		return fmt.Errorf("pidfd_getfd: %w", err)
	}
	err = unix.Sendmsg(local, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0)
	runtime.KeepAlive(f)
	return errors.Join(err, unix.Close(local))
}

// messageOf returns the content of Hand's page at address page, for recvmsg(2): struct msghdr of linux/socket.h on 64
// bits, and what it points to.
func messageOf(page uintptr) []byte {
	image := make([]byte, controlAt+unix.CmsgSpace(4))
	put := func(at int, value uintptr) { binary.NativeEndian.PutUint64(image[at:], uint64(value)) }
	put(vectorAt, page+byteAt)
	put(vectorAt+8, 1)
	put(messageAt+16, page+vectorAt) // msg_iov
	put(messageAt+24, 1)
	put(messageAt+32, page+controlAt) // msg_control
	put(messageAt+40, uintptr(unix.CmsgSpace(4)))
	return image
}

// peek reads the process' memory.
func (p *Process) peek(at uintptr, size int) (data []byte, err error) {
	data = make([]byte, size)
	err = p.tracer.do(func() error {
		_, err := unix.PtracePeekData(p.tid, at, data)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read memory of the process: %w", p.died(err))
	}
	return data, nil
}

// poke writes to the process' memory.
func (p *Process) poke(at uintptr, data []byte) error {
	err := p.tracer.do(func() error {
		_, err := unix.PtracePokeData(p.tid, at, data)
		return err
	})
	if err != nil {
		return fmt.Errorf("write memory of the process: %w", p.died(err))
	}
	return nil
}

// CloseHanded makes process pid close descriptor fd, which Hand returned. It first checks that fd is still the same
// file as f (otherwise ErrNotUserfault, and nothing is closed).
func CloseHanded(ctx context.Context, pid, fd int, f *os.File) (err error) {
	p, err := Seize(ctx, pid)
	if err != nil {
		return fmt.Errorf("close descriptor %d of process %d: %w", fd, pid, err)
	}
	defer func() { err = both(err, p.Detach()) }()
	if err := sameFile(pid, fd, int(f.Fd())); err != nil {
		return err
	}
	if _, err := p.Syscall(ctx, unix.SYS_CLOSE, uintptr(fd)); err != nil {
		return fmt.Errorf("close descriptor %d of process %d: %w", fd, pid, err)
	}
	return nil
}
