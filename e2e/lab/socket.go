// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a raw socket in the network of a host. Packets have the kernel's time of arrival, because a busy machine
// may read them late.
type socket struct {
	file *os.File
	raw  syscall.RawConn
}

// openSocket makes a socket and calls prepare, unless it is nil, to set it up. The caller closes the socket.
func (h *Host) openSocket(domain, kind, protocol int, prepare func(fd int) error) (s *socket, err error) {
	var fd int
	if err := h.InNetwork(func() (err error) {
		if fd, err = unix.Socket(domain, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol); err != nil {
			return err
		}
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
		if err == nil && prepare != nil {
			err = prepare(fd)
		}
		if err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	s = &socket{file: os.NewFile(uintptr(fd), "socket")}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

// end makes receive return os.ErrDeadlineExceeded from now on.
func (s *socket) end() error { return s.file.SetReadDeadline(time.Now()) }

// receive waits for a packet and returns its length and its time of arrival. The error is os.ErrDeadlineExceeded at the
// socket's deadline.
func (s *socket) receive(b []byte) (n int, at time.Time, err error) {
	control := make([]byte, unix.CmsgSpace(int(unsafe.Sizeof(unix.Timespec{}))))
	var used int
	var failed error
	if err := s.raw.Read(func(fd uintptr) bool {
		n, used, _, _, failed = unix.Recvmsg(int(fd), b, control, 0)
		return !errors.Is(failed, unix.EAGAIN)
	}); err != nil {
		return 0, time.Time{}, err
	}
	at = time.Now()
	if messages, err := unix.ParseSocketControlMessage(control[:used]); failed == nil && err == nil {
		for _, m := range messages {
			stamped := m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS
			if stamped && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
				at = time.Unix((*unix.Timespec)(unsafe.Pointer(&m.Data[0])).Unix())
			}
		}
	}
	return n, at, failed
}

// send sends a packet. It does not wait for room: without room, it returns an error.
func (s *socket) send(b []byte, to unix.Sockaddr) error {
	var failed error
	if err := s.raw.Control(func(fd uintptr) { failed = unix.Sendto(int(fd), b, 0, to) }); err != nil {
		return err
	}
	return failed
}
