// SPDX-License-Identifier: Apache-2.0

package launch_test

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

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// talkative makes QEMU write a line for each block of code that the guest runs, megabytes per second.
var talkative = []string{"-d", "exec,nochain"}

// eventually polls until ok returns true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for ctx := qemutest.Context(t); !ok(); time.Sleep(10 * time.Millisecond) {
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

// TestOutputIsBounded checks that a QEMU that writes without end does not fill the disk, and runs on.
func TestOutputIsBounded(t *testing.T) {
	opts := qemutest.Options(t, qemutest.Self(), talkative...)
	p, vm := qemutest.StartWith(t, nil, opts)
	eventually(t, "the log has become the old one twice", func() bool {
		first := sizeOf(opts.LogPath + launch.OldLog)
		for _, path := range []string{opts.LogPath, opts.LogPath + launch.OldLog} {
			if size := sizeOf(path); size > launch.LogSize {
				t.Fatalf("%s has %d bytes", path, size)
			}
		}
		return first > launch.LogSize/2
	})
	if err := vm.QMP.Do(qemutest.Context(t), "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	if reason := p.ExitReason(); !strings.Contains(reason, "Trace ") || len(reason) > 8192 {
		t.Errorf("QEMU's last lines are %q", reason)
	}
}

// TestOutputWithoutADaemon checks that a QEMU is neither blocked nor ended when no daemon reads its output, and that a
// later daemon logs what QEMU writes from then on.
func TestOutputWithoutADaemon(t *testing.T) {
	opts := qemutest.Options(t, qemutest.Self(), talkative...)
	pipes, logs := filepath.Join(opts.Dir, "pipes"), opts.Dir
	opts.PipePath = filepath.Join(pipes, "m1")
	if err := launch.MakePipe(opts.PipePath); err != nil {
		t.Fatal(err)
	}
	pid, wait, err := launch.LaunchAlone(opts)
	if err != nil {
		t.Fatal(err)
	}
	h, err := process.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	t.Cleanup(func() {
		if err := unix.Kill(pid, unix.SIGKILL); err == nil {
			_ = wait() // it was killed
		}
	})
	vm := attachAtLast(t, opts.QMPPath)
	// Opening QEMU's descriptor through /proc makes another open file of the pipe. It reads nothing from the pipe.
	eventually(t, "the pipe is full", func() bool {
		pipe, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", pid), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer pipe.Close()
		held, err := unix.IoctlGetInt(int(pipe.Fd()), unix.TIOCINQ)
		return err == nil && held > 60<<10
	})
	if err := vm.QMP.Do(qemutest.Context(t), "query-status", nil, nil); err != nil {
		t.Fatal(err)
	}
	ran := cpuTime(t, pid)
	eventually(t, "the guest goes on with a full pipe", func() bool { return cpuTime(t, pid) > ran+10 })

	if err := launch.FollowOutputs(pipes, logs); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next daemon logs", func() bool { return sizeOf(launch.LogPath(logs, "m1")) > 64<<10 })
	if err := h.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = wait() // it was killed
	eventually(t, "the pipe goes with its QEMU", func() bool {
		_, err := os.Lstat(opts.PipePath)
		return errors.Is(err, fs.ErrNotExist)
	})
}

// TestLeftPipe checks that the pipe of a QEMU that ended while no daemon ran is removed.
func TestLeftPipe(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "output", "m1")
	if err := launch.MakePipe(path); err != nil {
		t.Fatal(err)
	}
	if err := launch.FollowOutputs(filepath.Dir(path), dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pipe is removed", func() bool {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	})
	if err := launch.FollowOutputs(filepath.Join(dir, "none"), dir); err != nil {
		t.Errorf("a directory that was never made: %v", err)
	}
}

// TestLimitLogs checks that the oldest logs are removed, except a log to which a QEMU may still write.
func TestLimitLogs(t *testing.T) {
	dir := t.TempDir()
	pipes := filepath.Join(dir, "output")
	if err := launch.MakePipe(filepath.Join(pipes, "m0")); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		path := launch.LogPath(dir, fmt.Sprintf("m%d", i))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.WriteFile(path+launch.OldLog, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Unix(int64(1000+i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := launch.LimitLogs(pipes, dir, 2); err != nil {
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
func attachAtLast(t *testing.T, path string) (vm *qemu.VM) {
	t.Helper()
	eventually(t, "QEMU listens", func() (ok bool) {
		var err error
		vm, err = qemu.Attach(context.Background(), path)
		return err == nil
	})
	t.Cleanup(func() { _ = vm.Close() }) // its QEMU may have ended
	return vm
}

// cpuTime returns the user time of a process in clock ticks: utime of proc_pid_stat(5).
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
