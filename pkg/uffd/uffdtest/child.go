// SPDX-License-Identifier: Apache-2.0

// Package uffdtest gives tests a process whose memory they may register: no Go thread ever waits for a
// page of its own process. The process is a small C program, compiled on first use, that executes
// requests (testdata/child.c).
package uffdtest

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// patience limits every wait for the child, so that a lost wake-up fails a test instead of blocking it.
const patience = 2 * time.Minute

//go:embed testdata/child.c
var childSource []byte

// childBinary writes the program to a memfd: no file is left behind, however a test ends.
var childBinary = sync.OnceValues(func() (*os.File, error) {
	elf, err := childProgram()
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate(memfdName, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// The program is executed by its descriptor number, which must not be the child's descriptor 3.
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(high), memfdName)
	if _, err := f.Write(elf); err != nil {
		return nil, err
	}
	return f, nil
})

// childProgram compiles the program. Where there is no compiler, as in the initramfs of the tests of the kernel
// series, UFFDTEST_CHILD names a program that was compiled before.
func childProgram() ([]byte, error) {
	if path := os.Getenv("UFFDTEST_CHILD"); path != "" {
		return os.ReadFile(path)
	}
	dir, err := os.MkdirTemp("", "uffdtest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	source, binary := filepath.Join(dir, "child.c"), filepath.Join(dir, "child")
	if err := os.WriteFile(source, childSource, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command(
		"gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", binary, source,
	).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w: %s", err, out)
	}
	return os.ReadFile(binary)
}

const memfdName = "uffdtest-child"

// Child is the process. Its methods fail the test if the process does not answer.
type Child struct {
	Pid int

	t    testing.TB
	cmd  *exec.Cmd
	sock int
	slot uint64
}

// Start runs the process until the test ends.
func Start(t testing.TB) *Child {
	t.Helper()
	binary, err := childBinary()
	if err != nil {
		testenv.CannotRun(t, "cannot build the child: %v", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "child")
	defer theirs.Close()

	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", binary.Fd()))
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	// Do not use Pdeathsig: it depends on the thread that started the process, and Go may end that thread.
	if err := cmd.Start(); err != nil {
		unix.Close(pair[0])
		t.Fatal(err)
	}
	c := &Child{Pid: cmd.Process.Pid, t: t, cmd: cmd, sock: pair[0]}
	t.Cleanup(func() {
		c.Kill()
		unix.Close(c.sock)
	})
	// Wait for an answer: then the process has its own memory. Before, it may have ours: execve(2) closes the
	// descriptor that os/exec waits for before it changes the memory (fs/exec.c, begin_new_exec).
	c.Do(Discard(uffd.Range{}))
	return c
}

// Kill ends the process and waits until it and its address space are gone.
func (c *Child) Kill() {
	if c.cmd == nil {
		return
	}
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	c.cmd = nil
}

// The numbers of the requests in testdata/child.c.
const (
	opOpen = 1 + iota
	opMap
	opAlias
	opStart
	opJoin
	opDo
	opSend
	opClose
	opTruncate
)

type request struct{ Op, Action, Slot, X, Y, Z uint64 }

// Result is the result of a request to the child.
type Result struct {
	Value int64
	Errno syscall.Errno
}

func (c *Child) call(rq request, payload ...byte) (Result, int) {
	c.t.Helper()
	var b bytes.Buffer
	_ = binary.Write(&b, binary.NativeEndian, rq)
	b.Write(payload)
	if _, err := unix.Write(c.sock, b.Bytes()); err != nil {
		c.t.Fatalf("child: request %+v: %v", rq, err)
	}
	reply, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(c.sock, reply, oob, unix.MSG_CMSG_CLOEXEC)
	for errors.Is(err, unix.EINTR) { // a signal of the runtime; SO_RCVTIMEO keeps the kernel from going on by itself
		n, oobn, _, _, err = unix.Recvmsg(c.sock, reply, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil || n != len(reply) {
		c.t.Fatalf("child: no reply to %+v within %v: %d bytes, %v", rq, patience, n, err)
	}
	fd := -1
	if oobn > 0 {
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			c.t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			c.t.Fatal(err)
		}
		fd = fds[0]
	}
	return Result{
		Value: int64(binary.NativeEndian.Uint64(reply)),
		Errno: syscall.Errno(binary.NativeEndian.Uint64(reply[8:])),
	}, fd
}

// must is call for a request that must succeed. It fails the test otherwise.
func (c *Child) must(what string, rq request, payload ...byte) (uint64, int) {
	c.t.Helper()
	r, fd := c.call(rq, payload...)
	if r.Errno != 0 {
		c.t.Fatalf("child: %s: %v", what, r.Errno)
	}
	return uint64(r.Value), fd
}

// NewUFFD has the child make a userfaultfd and returns a copy of the descriptor, non-blocking and without
// its handshake. The child keeps its own descriptor until it ends.
func (c *Child) NewUFFD(method uffd.OpenMethod) *uffd.UFFD {
	c.t.Helper()
	_, fd := c.must("userfaultfd", request{Op: opOpen, X: uint64(method), Y: unix.O_CLOEXEC | unix.O_NONBLOCK})
	u := uffd.FromFD(fd) // without UFFD_SECURE
	c.t.Cleanup(func() { u.Close() })
	return u
}

// Supervise calls NewUFFD and makes the handshake with want.
func (c *Child) Supervise(want uffd.Features) *uffd.UFFD {
	c.t.Helper()
	u := c.NewUFFD(uffd.OpenSyscall)
	if _, _, err := u.API(want); err != nil {
		c.t.Fatal(err)
	}
	return u
}

// Send has the child connect to the Unix socket at path and send message with its userfaultfd.
func (c *Child) Send(path, message string) {
	c.t.Helper()
	c.must("send", request{Op: opSend}, []byte(path+"\x00"+message)...)
}
