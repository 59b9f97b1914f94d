// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// talkative has QEMU write a line for each block of code that the guest runs, megabytes each second.
var talkative = []string{"-d", "exec,nochain"}

// eventually polls until ok says so.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for ctx := testContext(t); !ok(); time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatalf("not within the time of a test: %s", what)
		}
	}
}

func sizeOf(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}

// TestOutputIsBounded: a QEMU that writes without end fills no disk, and goes on.
func TestOutputIsBounded(t *testing.T) {
	opts := startOptions(t, Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, talkative...)
	p, vm := startWith(t, nil, opts)
	eventually(t, "the log has become the old one twice", func() bool {
		first := sizeOf(opts.LogPath + oldLog)
		for _, path := range []string{opts.LogPath, opts.LogPath + oldLog} {
			if size := sizeOf(path); size > logSize {
				t.Fatalf("%s has %d bytes", path, size)
			}
		}
		return first > logSize/2
	})
	if err := vm.QMP.Do(testContext(t), "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	if reason := p.ExitReason(); !strings.Contains(reason, "Trace ") || len(reason) > 8192 {
		t.Errorf("QEMU's last lines are %q", reason)
	}
}

// TestOutputWithoutADaemon: a QEMU whose output nobody takes is neither held up nor ended, and a later daemon takes what
// it writes from then on.
func TestOutputWithoutADaemon(t *testing.T) {
	opts := startOptions(t, Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, talkative...)
	pipes, logs := filepath.Join(opts.Dir, "pipes"), opts.Dir
	opts.PipePath = filepath.Join(pipes, "m1")
	if err := makePipe(opts.PipePath); err != nil {
		t.Fatal(err)
	}
	c, err := launch(opts)
	if err != nil {
		t.Fatal(err)
	}
	pidfd, err := openPidfd(c.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	t.Cleanup(func() {
		if err := unix.Kill(c.pid, unix.SIGKILL); err == nil {
			_ = c.wait() // it was killed
		}
	})
	vm := attachAtLast(t, opts.QMPPath)
	// From outside: a second description of QEMU's own descriptor, which takes nothing.
	eventually(t, "the pipe is full", func() bool {
		pipe, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", c.pid), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer pipe.Close()
		held, err := unix.IoctlGetInt(int(pipe.Fd()), unix.TIOCINQ)
		return err == nil && held > 60<<10
	})
	if err := vm.QMP.Do(testContext(t), "query-status", nil, nil); err != nil {
		t.Fatal(err)
	}
	ran := cpuTime(t, c.pid)
	eventually(t, "the guest goes on with a full pipe", func() bool { return cpuTime(t, c.pid) > ran+10 })

	if err := FollowOutputs(pipes, logs); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next daemon logs", func() bool { return sizeOf(LogPath(logs, "m1")) > 64<<10 })
	if err := killPidfd(pidfd); err != nil {
		t.Fatal(err)
	}
	_ = c.wait() // it was killed
	eventually(t, "the pipe goes with its QEMU", func() bool {
		_, err := os.Lstat(opts.PipePath)
		return errors.Is(err, fs.ErrNotExist)
	})
}

// TestLeftPipe: what a QEMU left that ended while no daemon ran is removed.
func TestLeftPipe(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "output", "m1")
	if err := makePipe(path); err != nil {
		t.Fatal(err)
	}
	if err := FollowOutputs(filepath.Dir(path), dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pipe is removed", func() bool {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	})
	if err := FollowOutputs(filepath.Join(dir, "none"), dir); err != nil {
		t.Errorf("a directory that was never made: %v", err)
	}
}

// TestLimitLogs: the oldest go, but none whose QEMU may still write to it.
func TestLimitLogs(t *testing.T) {
	dir := t.TempDir()
	pipes := filepath.Join(dir, "output")
	if err := makePipe(filepath.Join(pipes, "m0")); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		path := LogPath(dir, fmt.Sprintf("m%d", i))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.WriteFile(path+oldLog, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Unix(int64(1000+i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := LimitLogs(pipes, dir, 2); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*.log*"))
	if err != nil {
		t.Fatal(err)
	}
	for i, path := range left {
		left[i] = filepath.Base(path)
	}
	if got := strings.Join(left, " "); got != "m0.log m0.log.old m3.log m3.log.old m4.log m4.log.old" {
		t.Errorf("left are %s", got)
	}
}

// attachAtLast attaches as soon as QEMU listens.
func attachAtLast(t *testing.T, path string) (vm *VM) {
	t.Helper()
	eventually(t, "QEMU listens", func() (ok bool) {
		var err error
		vm, err = Attach(context.Background(), path)
		return err == nil
	})
	t.Cleanup(func() { _ = vm.Close() }) // its QEMU may be gone
	return vm
}

// cpuTime is what a process has used, in clock ticks: utime of proc_pid_stat(5).
func cpuTime(t *testing.T, pid int) (ticks int) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if _, err := fmt.Sscan(fields[14-3], &ticks); err != nil {
		t.Fatal(err)
	}
	return ticks
}
