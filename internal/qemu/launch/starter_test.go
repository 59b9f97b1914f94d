// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/confine"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// startCommand is the argument that makes the test program a Starter's process.
const startCommand = "test-start-qemus"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == startCommand {
		if err := errors.Join(confine.ApplyToStarter(), launch.ServeStarter(os.Args[2], os.Args[3:])); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func newStarter(t *testing.T, binaries ...string) *launch.Starter {
	t.Helper()
	s, err := launch.NewStarter(startCommand, "", binaries)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// parentOf returns the PID of a process's parent.
func parentOf(t *testing.T, pid int) string {
	t.Helper()
	status, err := process.Status(pid)
	if err != nil {
		t.Fatal(err)
	}
	return status["PPid"]
}

func TestStarter(t *testing.T) {
	qemutest.NeedRoot(t)
	s := newStarter(t, qemutest.Binary(t))
	opts := qemutest.Options(t, qemutest.Unprivileged, "-sandbox", qemutest.Sandbox)
	p, vm := qemutest.StartWith(t, s, opts)
	status, err := process.Status(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(status["Uid"], "65534\t65534") || status["PPid"] == fmt.Sprint(os.Getpid()) {
		t.Errorf("QEMU's user is %q, its parent process %s is to be another than %d",
			status["Uid"], status["PPid"], os.Getpid())
	}
	// The Starter's filters apply to all its children. QEMU's own sandbox adds another.
	if n, err := strconv.Atoi(status["Seccomp_filters"]); err == nil && n < 3 {
		t.Errorf("QEMU has %d filters of system calls, want 2 of the Starter's and its sandbox's own", n)
	}
	select {
	case <-p.Exited():
		t.Error("QEMU is said to have ended")
	default:
	}
	if err := vm.Quit(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	if reason := p.ExitReason(); !strings.HasSuffix(reason, "exit status 0") {
		t.Errorf("QEMU ended with %q", reason)
	}
	if err := p.Kill(qemutest.Context(t)); err != nil {
		t.Errorf("kill what has ended: %v", err)
	}
}

func TestStarterTellsWhatFailed(t *testing.T) {
	s := newStarter(t, qemutest.Binary(t))
	self := qemutest.Self()
	for name, c := range map[string]struct {
		change func(*launch.Options)
		want   string
	}{
		"another program": {
			func(o *launch.Options) { o.Args[0] = "/bin/sh" },
			"only " + qemutest.Binary(t) + " may be started here",
		},
		"by another name": {
			func(o *launch.Options) { o.Args[0] = "./" + filepath.Base(o.Args[0]) }, "is not the QEMU binary",
		},
		"no program": {func(o *launch.Options) { o.Args = nil }, "no program"},
		"bad option": {func(o *launch.Options) { o.Args = append(o.Args, "-no-such-option") }, "exit status 1"},
		"no log":     {func(o *launch.Options) { o.LogPath = "/nowhere/log" }, "log of QEMU: open /nowhere/log"},
	} {
		t.Run(name, func(t *testing.T) {
			opts := qemutest.Options(t, self)
			c.change(&opts)
			if _, _, err := qemu.Start(qemutest.Context(t), s, opts); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestStarterEnds checks that the Starter ends with the process that started it, and that QEMU goes on.
func TestStarterEnds(t *testing.T) {
	s := newStarter(t, qemutest.Binary(t))
	p, vm := qemutest.StartWith(t, s, qemutest.Options(t, qemutest.Self()))
	starter := parentOf(t, p.Pid())
	if err := s.Close(); err != nil { // as the end of this process does
		t.Fatal(err)
	}
	for parentOf(t, p.Pid()) == starter {
		if err := qemutest.Context(t).Err(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	if err := vm.QMP.Do(qemutest.Context(t), "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	opts := qemutest.Options(t, process.Credentials{})
	_, _, err := qemu.Start(qemutest.Context(t), s, opts)
	if err == nil || !strings.Contains(err.Error(), "restart this daemon") {
		t.Errorf("without a process that starts QEMU: %v", err)
	}
	if err := unix.Kill(p.Pid(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := vm.WaitExit(qemutest.Context(t)); err != nil {
		t.Error(err)
	}
}
