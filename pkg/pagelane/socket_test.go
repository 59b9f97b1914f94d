// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// counted counts the calls of Close, as package limits does.
type counted struct {
	net.Conn

	ends int
}

func (c *counted) NetConn() net.Conn { return c.Conn }

func (c *counted) Close() error {
	c.ends++
	return c.Conn.Close()
}

// sockets connects two sockets over the loopback. The first one is out of the poller.
func sockets(t *testing.T) (*socket, *counted, net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	there, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { there.Close() })
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	owner := &counted{Conn: accepted}
	s := &socket{Conn: owner}
	t.Cleanup(func() { s.Close() })
	if err := s.leavePoller(); err != nil {
		t.Fatal(err)
	}
	if s.file.Load() == nil || owner.ends != 0 {
		t.Fatalf("out of the poller: %v; ended %d times", s.file.Load() != nil, owner.ends)
	}
	return s, owner, there
}

// TestSocket: a socket that is out of the poller works as any net.Conn does.
func TestSocket(t *testing.T) {
	s, owner, there := sockets(t)
	if s.RemoteAddr().String() != there.LocalAddr().String() || s.LocalAddr().String() != there.RemoteAddr().String() {
		t.Errorf("addresses %v and %v, the other side has %v and %v",
			s.LocalAddr(), s.RemoteAddr(), there.LocalAddr(), there.RemoteAddr())
	}
	long := make([]byte, 8<<20) // more than the socket buffers of both ends hold
	wrote := make(chan error, 1)
	go func() {
		_, err := s.Write(long)
		wrote <- err
	}()
	if _, err := io.ReadFull(there, make([]byte, len(long))); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if _, err := there.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	heard := make([]byte, 5)
	if _, err := io.ReadFull(s, heard); err != nil || string(heard) != "hello" {
		t.Fatalf("read %q, %v", heard, err)
	}
	if err := there.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(heard); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Read(heard); !errors.Is(err, os.ErrClosed) || owner.ends != 1 {
		t.Errorf("after Close: %v; ended %d times", err, owner.ends)
	}
}

// TestSocketWakes: Close wakes a goroutine that sleeps in read(2), write(2) or poll(2), and so does a deadline.
func TestSocketWakes(t *testing.T) {
	for name, c := range map[string]struct {
		sleep func(*socket) error
		wake  func(*socket)
		want  error
	}{
		"close a reader": {
			func(s *socket) error { _, err := s.Read(make([]byte, 1)); return err },
			func(s *socket) { _ = s.Close() }, nil,
		},
		"close a writer": {
			func(s *socket) error { _, err := s.Write(make([]byte, 64<<20)); return err },
			func(s *socket) { _ = s.Close() }, nil,
		},
		"late reader": {func(s *socket) error {
			if err := s.SetDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
				t.Error(err)
			}
			_, err := s.Read(make([]byte, 1))
			return err
		}, func(*socket) {}, os.ErrDeadlineExceeded},
		"late reader of much": {func(s *socket) error {
			if err := s.SetDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
				t.Error(err)
			}
			s.expect(8 << 10)
			_, err := s.Read(make([]byte, 1))
			return err
		}, func(*socket) {}, os.ErrDeadlineExceeded},
		"close a reader of much": {func(s *socket) error {
			s.expect(8 << 10)
			_, err := s.Read(make([]byte, 1))
			return err
		}, func(s *socket) { _ = s.Close() }, nil},
		"late writer": {func(s *socket) error {
			if err := s.SetDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
				t.Error(err)
			}
			_, err := s.Write(make([]byte, 64<<20))
			return err
		}, func(*socket) {}, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			s, _, _ := sockets(t)
			woken := make(chan error, 1)
			go func() { woken <- c.sleep(s) }()
			time.Sleep(10 * time.Millisecond) // by then it sleeps, most of the time; the test holds either way
			c.wake(s)
			select {
			case err := <-woken:
				if err == nil || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("woken with %v, want %v", err, c.want)
				}
			case <-time.After(patience):
				t.Fatal("it sleeps on")
			}
		})
	}
}
