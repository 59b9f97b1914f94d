// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/processors"
	"github.com/migrated-vm/migrated/internal/within"
)

// mostSlept is half of the window that TCP begins with: so much comes in any case. A sender that may send less than a packet waits
// for more of the window, or 200 ms, and who sleeps for more than there is room for opens none.
const mostSlept = 32 << 10

// A socket is a connection that can be taken out of the poller of Go's runtime. From then on who reads or writes it sleeps
// in the system call, a thread for each.
//
// In the middle of a migration a lane sleeps and is woken for each message, thousands of times a second. By way of the
// poller each time costs the processor more than the message: a thread wakes in epoll_wait(2), looks for the goroutine,
// wakes another thread to look for more work, which finds none and goes to sleep, and the runtime's monitor wakes, too, to
// see that nobody hangs (docs/fault-budget.md). A thread that was in read(2) just goes on.
type socket struct {
	net.Conn // as it was made

	file   atomic.Pointer[os.File] // the same socket, once it is out of the poller
	raw    syscall.RawConn         // that of file, set before it
	closed atomic.Bool

	// Of the reader.
	sleeper processors.Sleeper
	least   int
	sleep   func(fd uintptr) // made once: a closure for each call would be allocated
	poll    [1]unix.PollFd
}

// leavePoller takes the connection out of the poller, if it is TCP. Nobody may be reading or writing.
func (s *socket) leavePoller() error {
	tcp, ok := within.Conn[*net.TCPConn](s.Conn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	var fd int
	controlErr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(controlErr, err); err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	file := os.NewFile(uintptr(fd), "lane")
	if s.raw, err = file.SyscallConn(); err != nil {
		return errors.Join(err, file.Close())
	}
	s.sleep = s.sleepUntil
	s.file.Store(file)
	processors.Add(1)
	// Only its descriptor: whoever made the connection learns by Close that it has ended. Were it to stay open, the
	// poller would still be woken for all that comes.
	err = tcp.Close()
	if s.closed.Load() { // before there was a file to be closed
		return errors.Join(net.ErrClosed, s.Close())
	}
	return err
}

// await sleeps until there are n bytes to be read, or mostSlept: a thread that sleeps in read(2) is woken by each packet of them.
// The peer must be about to send them. It does nothing before the connection is out of the poller.
func (s *socket) await(n int) {
	if s.file.Load() == nil {
		return
	}
	s.least = min(n, mostSlept)
	_ = s.raw.Control(s.sleep) // closed: Read says so
}

// sleepUntil sets how many bytes poll(2) sleeps for. read(2) must not be called with more than one: it takes what is
// there and sleeps for the rest, but the kernel wakes it for no less than the whole again (tcp_data_ready in
// net/ipv4/tcp_input.c), which never comes.
func (s *socket) sleepUntil(fd uintptr) {
	if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, s.least) != nil {
		return
	}
	s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	_, _ = unix.Poll(s.poll[:], -1) // a signal, at worst: then Read sleeps for less
	_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, 1)
}

// NetConn is the connection as it was made.
func (s *socket) NetConn() net.Conn { return s.Conn }

// Read implements net.Conn.
func (s *socket) Read(p []byte) (int, error) {
	file := s.file.Load()
	if file == nil {
		return s.Conn.Read(p)
	}
	n, err := file.Read(p)
	s.sleeper.Woke()
	return n, asTimeout(err)
}

// Write implements net.Conn.
func (s *socket) Write(p []byte) (int, error) {
	file := s.file.Load()
	if file == nil {
		return s.Conn.Write(p)
	}
	n, err := file.Write(p)
	return n, asTimeout(err)
}

// asTimeout gives the error of a call that has slept as long as it may its name in Go.
func asTimeout(err error) error {
	if err != nil && errors.Is(err, unix.EAGAIN) {
		return os.ErrDeadlineExceeded
	}
	return err
}

// Close implements net.Conn. Whoever sleeps in a call is woken.
func (s *socket) Close() error {
	s.closed.Store(true)
	file := s.file.Load()
	if file == nil {
		return s.Conn.Close()
	}
	_ = s.raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) }) // ENOTCONN: nobody sleeps there
	err := file.Close()
	if err == nil {
		processors.Add(-1)
		_ = s.Conn.Close() // it has no descriptor any more, but somebody may count it
	}
	return err
}

// SetDeadline implements net.Conn, but out of the poller it holds for calls that begin later.
func (s *socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline is SetDeadline for Read.
func (s *socket) SetReadDeadline(t time.Time) error {
	if s.file.Load() == nil {
		return s.Conn.SetReadDeadline(t)
	}
	return s.timeout(unix.SO_RCVTIMEO, t)
}

// SetWriteDeadline is SetDeadline for Write.
func (s *socket) SetWriteDeadline(t time.Time) error {
	if s.file.Load() == nil {
		return s.Conn.SetWriteDeadline(t)
	}
	return s.timeout(unix.SO_SNDTIMEO, t)
}

// timeout sets how long a call may sleep: socket(7).
func (s *socket) timeout(option int, t time.Time) (err error) {
	var most unix.Timeval // zero: for ever
	if !t.IsZero() {
		most = unix.NsecToTimeval(max(time.Until(t), time.Microsecond).Nanoseconds())
	}
	controlErr := s.raw.Control(func(fd uintptr) { err = unix.SetsockoptTimeval(int(fd), unix.SOL_SOCKET, option, &most) })
	return errors.Join(controlErr, err)
}
