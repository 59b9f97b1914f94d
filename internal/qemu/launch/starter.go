// SPDX-License-Identifier: Apache-2.0

package launch

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

	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
)

// A Starter is a process that starts QEMUs for this one. It runs the same program, and begins while this process may
// still start programs. It is the parent of the QEMUs and uses no network. It starts only the binaries and the hook
// that it was given. It ends with this process; the QEMUs go on.
type Starter struct {
	client *rpc.Client
}

// starterFD is the descriptor of the connection in the Starter's process: the first of exec.Cmd's ExtraFiles.
const starterFD = 3

// NewStarter starts the process. command is an argument that makes this program call ServeStarter; hook and binaries
// are the arguments after it.
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
	go func() { _ = cmd.Wait() }() // after its end, calls fail with an error
	return &Starter{client: rpc.NewClient(ours)}, nil
}

// connection returns a connected pair of sockets. theirs is for the child process. The caller closes both.
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

// connOf makes a connection of a socket's descriptor, and takes it over.
func connOf(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "starter")
	defer f.Close() // FileConn duplicates it
	return net.FileConn(f)
}

// launch makes the Starter start QEMU. The Starter does not wait for it before wait is called, so its PID is not reused
// until then.
func (s *Starter) launch(opts Options) (child, error) {
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

// makePipe makes the Starter create the pipe for a QEMU's output.
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

// ServeStarter runs the Starter's process. It serves the process that started it until that one ends.
func ServeStarter(hook string, binaries []string) error {
	conn, err := connOf(starterFD)
	if err != nil {
		return fmt.Errorf("no connection to a daemon, and only a daemon starts this: %w", err)
	}
	server := rpc.NewServer()
	if err := server.RegisterName("Starts", &starts{
		hook: hook, binaries: binaries, children: make(map[int]child),
	}); err != nil {
		return err
	}
	server.ServeConn(conn)
	return nil
}

// starts serves the RPC calls of a Starter.
type starts struct {
	hook     string // empty: none
	binaries []string

	mu       sync.Mutex
	children map[int]child // by PID; those that no Wait has taken
}

// MakePipe makes the pipe for a QEMU's output. The daemon may not do that itself, and it opens the reading end before
// QEMU starts.
func (*starts) MakePipe(path string, made *bool) error {
	err := makePipe(path)
	*made = err == nil
	return err
}

// Start starts QEMU. It checks again that the binary is allowed, because the daemon that asks is on a network.
func (s *starts) Start(opts Options, pid *int) error {
	if len(opts.Args) == 0 {
		return errors.New("no program to start")
	}
	if found, err := cmdline.FindBinary(opts.Args[0], s.binaries); err != nil {
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

// Wait returns when the process has ended. exit says how; it is empty for exit status 0.
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
