// SPDX-License-Identifier: Apache-2.0

package qemu

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
)

// startCommand makes this test's program a Starter's process.
const startCommand = "test-start-qemus"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == startCommand {
		if err := errors.Join(confine.ApplyToStarter(), ServeStarter(os.Args[2], os.Args[3:])); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func newStarter(t *testing.T, binaries ...string) *Starter {
	t.Helper()
	s, err := NewStarter(startCommand, "", binaries)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// parentOf is the number of a process' parent.
func parentOf(t *testing.T, pid int) string {
	t.Helper()
	status, err := readStatus(pid)
	if err != nil {
		t.Fatal(err)
	}
	return status["PPid"]
}

func TestStarter(t *testing.T) {
	needRoot(t)
	s := newStarter(t, qemuBinary(t))
	opts := startOptions(t, unprivileged, "-sandbox", sandbox)
	p, vm := startWith(t, s, opts)
	status, err := readStatus(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(status["Uid"], "65534\t65534") || status["PPid"] == fmt.Sprint(os.Getpid()) {
		t.Errorf("QEMU's user is %q, its parent process %s is to be another than %d", status["Uid"], status["PPid"], os.Getpid())
	}
	// What the Starter denies to all, and QEMU's own sandbox beneath.
	if n, err := strconv.Atoi(status["Seccomp_filters"]); err == nil && n < 3 {
		t.Errorf("QEMU has %d filters of system calls, want 2 of the Starter's and its sandbox's own", n)
	}
	select {
	case <-p.Exited():
		t.Error("QEMU is said to have ended")
	default:
	}
	if err := vm.Quit(testContext(t)); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	if reason := p.ExitReason(); !strings.HasSuffix(reason, "exit status 0") {
		t.Errorf("QEMU ended with %q", reason)
	}
	if err := p.Kill(testContext(t)); err != nil {
		t.Errorf("kill what has ended: %v", err)
	}
}

func TestStarterTellsWhatFailed(t *testing.T) {
	s := newStarter(t, qemuBinary(t))
	self := Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	for name, c := range map[string]struct {
		change func(*StartOptions)
		want   string
	}{
		"another program": {func(o *StartOptions) { o.Args[0] = "/bin/sh" }, "only " + qemuBinary(t) + " may be started here"},
		"by another name": {func(o *StartOptions) { o.Args[0] = "./" + filepath.Base(o.Args[0]) }, "is not the QEMU binary"},
		"no program":      {func(o *StartOptions) { o.Args = nil }, "no program"},
		"bad option":      {func(o *StartOptions) { o.Args = append(o.Args, "-no-such-option") }, "exit status 1"},
		"no log":          {func(o *StartOptions) { o.LogPath = "/nowhere/log" }, "log of QEMU: open /nowhere/log"},
	} {
		t.Run(name, func(t *testing.T) {
			opts := startOptions(t, self)
			c.change(&opts)
			if _, _, err := s.Start(testContext(t), opts); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestStarterEnds with the process that started it, and QEMU stays.
func TestStarterEnds(t *testing.T) {
	s := newStarter(t, qemuBinary(t))
	p, vm := startWith(t, s, startOptions(t, Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}))
	starter := parentOf(t, p.Pid())
	if err := s.Close(); err != nil { // as the end of the process does
		t.Fatal(err)
	}
	for parentOf(t, p.Pid()) == starter {
		if err := testContext(t).Err(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	if err := vm.QMP.Do(testContext(t), "query-status", nil, nil); err != nil {
		t.Error(err)
	}
	opts := startOptions(t, Credentials{})
	if _, _, err := s.Start(testContext(t), opts); err == nil || !strings.Contains(err.Error(), "restart this daemon") {
		t.Errorf("without a process that starts QEMU: %v", err)
	}
	if err := unix.Kill(p.Pid(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := vm.WaitExit(testContext(t)); err != nil {
		t.Error(err)
	}
}
