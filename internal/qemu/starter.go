// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Starter is a process that starts QEMUs for this one: it is this program once more, begun while this process
// may still start programs. It is their parent, has nothing to do with any network, starts no program but the
// binaries and the hook it was given, and ends when this process does; the QEMUs do not.
type Starter struct {
	client *rpc.Client
}

// starterFD is where the Starter's process finds its end of the connection: the first of exec.Cmd's ExtraFiles.
const starterFD = 3

// NewStarter starts the process, as command, an argument of this program which must call ServeStarter, with hook and
// binaries as arguments after it.
func NewStarter(command, hook string, binaries []string) (*Starter, error) {
	ours, theirs, err := connection()
	if err != nil {
		return nil, fmt.Errorf("connection to the process that starts QEMU: %w", err)
	}
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe", append([]string{command, hook}, binaries...)...)
	cmd.Args[0] = os.Args[0]
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // an interrupt at a terminal is for the daemon, which ends it
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the process that starts QEMU: %w", err), ours.Close())
	}
	go func() { _ = cmd.Wait() }() // calls fail then, and say so
	return &Starter{client: rpc.NewClient(ours)}, nil
}

// connection is a pair of sockets, one of them to be inherited.
func connection() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(fds[1]), "starter")
	if ours, err = connOf(fds[0]); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}

// connOf takes over a socket.
func connOf(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "starter")
	defer f.Close() // FileConn duplicates it
	return net.FileConn(f)
}

// launch has QEMU started. Nobody waits for it before wait is called, so that its number remains its own.
func (s *Starter) launch(opts StartOptions) (child, error) {
	var pid int
	if err := s.call("Starts.Start", opts, &pid); err != nil {
		return child{}, err
	}
	return child{pid, func() error {
		var exit string
		if err := s.call("Starts.Wait", pid, &exit); err != nil {
			return err
		}
		if exit != "" {
			return errors.New(exit)
		}
		return nil
	}}, nil
}

// makePipe has the pipe of a QEMU's output made.
func (s *Starter) makePipe(path string) error { return s.call("Starts.MakePipe", path, new(bool)) }

func (s *Starter) call(method string, args, reply any) error {
	err := s.client.Call(method, args, reply)
	var told rpc.ServerError
	if err == nil || errors.As(err, &told) {
		return err
	}
	return fmt.Errorf("the process that starts QEMU is gone (%w): restart this daemon", err)
}

// Close ends the process.
func (s *Starter) Close() error { return s.client.Close() }

// ServeStarter is the Starter's process: it serves the one that started it, until that ends.
func ServeStarter(hook string, binaries []string) error {
	conn, err := connOf(starterFD)
	if err != nil {
		return fmt.Errorf("no connection to a daemon, which alone starts this: %w", err)
	}
	server := rpc.NewServer()
	if err := server.RegisterName("Starts", &starts{hook: hook, binaries: binaries, children: make(map[int]child)}); err != nil {
		return err
	}
	server.ServeConn(conn)
	return nil
}

// starts are the calls of a Starter.
type starts struct {
	hook     string // empty: none
	binaries []string

	mu       sync.Mutex
	children map[int]child // that nobody waits for yet, by their numbers
}

// MakePipe makes the pipe of a QEMU's output, which the daemon may not: it opens its reading end before QEMU starts.
func (*starts) MakePipe(path string, made *bool) error {
	err := makePipe(path)
	*made = err == nil
	return err
}

// Start starts QEMU. What may be started is asked once more: who asks is on a network.
func (s *starts) Start(opts StartOptions, pid *int) error {
	if len(opts.Args) == 0 || len(s.binaries) == 0 {
		return errors.New("no program to start")
	}
	if found, err := findBinary(opts.Args[0], s.binaries); err != nil {
		return err
	} else if found != opts.Args[0] {
		return fmt.Errorf("%s is not the QEMU binary %s", opts.Args[0], found)
	}
	c, err := launch(opts)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.children[c.pid] = c
	*pid = c.pid
	return nil
}

// Wait returns when the process has ended, and how; empty: with exit status 0.
func (s *starts) Wait(pid int, exit *string) error {
	s.mu.Lock()
	c, ours := s.children[pid]
	delete(s.children, pid)
	s.mu.Unlock()
	if !ours {
		return fmt.Errorf("process %d is none that was started here", pid)
	}
	if err := c.wait(); err != nil {
		*exit = err.Error()
	}
	return nil
}
