// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// heapOf returns the heap of a process as a block.
func heapOf(t *testing.T, pid int) Block {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var start, end uint64
		if !strings.HasSuffix(lines.Text(), "[heap]") {
			continue
		}
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x", &start, &end); err != nil {
			t.Fatal(err)
		}
		return Block{ID: "heap", PID: pid, Addr: start, Size: end - start, PageSize: minPageSize}
	}
	t.Fatal("the process has no heap")
	return Block{}
}

// openHeap opens the heap of a process, whose first page has content.
func openHeap(t *testing.T, pid int) *openBlock {
	t.Helper()
	ram, err := OpenRAM([]Block{heapOf(t, pid)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ram.Close(); err != nil {
			t.Error(err)
		}
	})
	b := &ram.blocks[0]
	if data, err := b.hole(0); err != nil || data != 0 {
		t.Fatalf("its first data is at %d, %v", data, err)
	}
	return b
}

// pipes returns the input of cmd, a cat that is started later, and a function that waits until it runs: it sends a byte
// and waits for its echo.
func pipes(t *testing.T, cmd *exec.Cmd) (in io.Closer, awaitBegun func()) {
	t.Helper()
	to, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	from, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	return to, func() {
		t.Helper()
		if _, err := to.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := from.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMemoryOfAProcessThatEnded: reading memory of a process that has ended fails with ErrProcessGone. Nothing of it is
// taken for a hole.
func TestMemoryOfAProcessThatEnded(t *testing.T) {
	cmd := exec.Command("cat")
	in, awaitBegun := pipes(t, cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitBegun()
	b := openHeap(t, cmd.Process.Pid)
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if data, err := b.hole(0); !errors.Is(err, ErrProcessGone) {
		t.Errorf("it has a hole up to %d: %v", data, err)
	}
	if err := b.confirm(0); !errors.Is(err, ErrProcessGone) {
		t.Errorf("a hole is confirmed: %v", err)
	}
	b.PageSize = 2 << 20
	if err := b.confirm(0); !errors.Is(err, ErrProcessGone) {
		t.Errorf("a hole of huge pages is confirmed: %v", err)
	}
	if err := b.read(make([]byte, 4096), 0); !errors.Is(err, ErrProcessGone) {
		t.Errorf("it can be read: %v", err)
	}
}

// TestMemoryThatTheKernelTakesAway: when memory is short, the kernel takes the memory of a process that it kills before
// the process has ended. That memory must not be taken for a hole either.
func TestMemoryThatTheKernelTakesAway(t *testing.T) {
	runtime.LockOSThread() // ptrace wants all requests from one thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	_, awaitBegun := pipes(t, cmd)
	if err := cmd.Start(); err != nil {
		testenv.CannotRun(t, "it cannot be traced: %v", err)
	}
	pid := cmd.Process.Pid
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || !status.Stopped() {
		t.Fatalf("it does not stop where it begins: %v, %#x", err, status)
	}
	options := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACEEXIT|unix.PTRACE_O_EXITKILL)
	if err := errors.Join(options, unix.PtraceCont(pid, 0)); err != nil {
		t.Fatal(err)
	}
	awaitBegun()
	b := openHeap(t, pid)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil {
		t.Fatal(err)
	}
	if !status.Stopped() {
		testenv.CannotRun(t, "this kernel does not stop what was killed before it ends")
	}
	defer func() {
		_ = unix.PtraceCont(pid, 0)
		_, _ = unix.Wait4(pid, nil, 0, nil) // its status does not matter
	}()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	const processMrelease = 448 // process_mrelease(2), Linux 5.15
	if _, _, errno := unix.Syscall(processMrelease, uintptr(pidfd), 0, 0); errno != 0 {
		testenv.CannotRun(t, "process_mrelease: %v", errno)
	}
	at, err := b.pages.Next(b.Addr, b.Addr+b.Size)
	if err != nil || at == b.Addr {
		t.Skipf("the kernel has left the memory: first page at %#x of %#x, %v", at, b.Addr, err)
	}
	if data, err := b.hole(0); err == nil {
		t.Errorf("what the kernel took is a hole up to %d", data)
	} else {
		t.Log(err)
	}
}
