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

	"github.com/migrated-vm/migrated/pkg/internal/schedule"
	"github.com/migrated-vm/migrated/pkg/pagelane/netconn"
)

// mostSlept limits, in bytes, how much a read waits for: half of TCP's initial window. A sender that has room for less
// than a packet waits for more window, or 200 ms; and a receiver that waits for more than the window has room for never
// opens it.
const mostSlept = 32 << 10

// Sleeps is called when n more goroutines block in system calls from now on, or -n fewer. Each keeps a processor of
// Go's runtime meanwhile, so a program should raise GOMAXPROCS by n. Sleeps is called from any goroutine. It may be
// nil.
type Sleeps func(n int)

func (s Sleeps) add(n int) {
	if s != nil {
		s(n)
	}
}

// A socket is a connection that can be taken out of the poller of Go's runtime. From then on a goroutine that reads or
// writes it sleeps in the system call, in a thread of its own.
//
// In the middle of a migration a lane sleeps and is woken for each message, thousands of times a second. By way of the
// poller, each wake-up costs the processor more than the message. A thread wakes in epoll_wait(2), looks for the
// goroutine, and wakes another thread to look for more work. That one finds none and goes to sleep. The runtime's
// monitor wakes, too, to see that nobody hangs (docs/fault-budget.md). A thread that was in read(2) just goes on.
type socket struct {
	net.Conn // as it was made
	sleeps   Sleeps

	file   atomic.Pointer[os.File] // the same socket, once it is out of the poller
	raw    syscall.RawConn         // of file; set before file is
	closed atomic.Bool
	hasty  atomic.Bool // a read deadline is set, and expect would ignore it

	// Of the reader.
	sleeper schedule.Sleeper
	least   int
	sleep   func(fd uintptr) // made once: a closure for each call would be allocated
	poll    [1]unix.PollFd
}

// leavePoller takes the connection out of the poller, if it is TCP. Nobody may be reading or writing.
func (s *socket) leavePoller() error {
	tcp, ok := netconn.Find[*net.TCPConn](s.Conn)
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
	s.sleeps.add(1)
	// This closes only the descriptor. If it stayed open, the poller would still be woken for all data. Whoever wrapped
	// the connection sees its end in Close.
	err = tcp.Close()
	if s.closed.Load() { // it was closed before there was a file
		return errors.Join(net.ErrClosed, s.Close())
	}
	return err
}

// expect implements expecter. It sleeps until there are n bytes to be read, or mostSlept. A thread that slept in
// read(2) would be woken by each packet of them. expect does nothing before the connection is out of the poller, or
// with a deadline.
func (s *socket) expect(n int) {
	if s.file.Load() == nil || s.hasty.Load() {
		return
	}
	s.least = min(n, mostSlept)
	_ = s.raw.Control(s.sleep) // closed: Read says so
}

// sleepUntil sleeps until s.least bytes can be read. It sets SO_RCVLOWAT back to one before read(2) is called.
// Otherwise read(2) would take what is there and sleep for the rest, but the kernel would wake it only when the whole
// number is there again (tcp_data_ready in net/ipv4/tcp_input.c), which never happens.
func (s *socket) sleepUntil(fd uintptr) {
	if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, s.least) != nil {
		return
	}
	s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	_, _ = unix.Poll(s.poll[:], -1) // a signal may end it: Read then waits for one byte
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

// asTimeout turns the error of a call that has slept as long as it may into Go's error for that.
func asTimeout(err error) error {
	if err != nil && errors.Is(err, unix.EAGAIN) {
		return os.ErrDeadlineExceeded
	}
	return err
}

// Close implements net.Conn. Goroutines that sleep in a call are woken.
func (s *socket) Close() error {
	s.closed.Store(true)
	file := s.file.Load()
	if file == nil {
		return s.Conn.Close()
	}
	_ = s.raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) }) // ENOTCONN: nobody sleeps there
	err := file.Close()
	if err == nil {
		s.sleeps.add(-1)
		_ = s.Conn.Close() // it has no descriptor any more, but somebody may count its Close
	}
	return err
}

// SetDeadline implements net.Conn, but once out of the poller it holds only for calls that begin later.
func (s *socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline is SetDeadline for Read.
func (s *socket) SetReadDeadline(t time.Time) error {
	if s.file.Load() == nil {
		return s.Conn.SetReadDeadline(t)
	}
	s.hasty.Store(!t.IsZero())
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
