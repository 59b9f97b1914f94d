// SPDX-License-Identifier: Apache-2.0

package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAlive: a process has ended if nobody has its PID, a zombie has it, another process has it, or the host was
// started again since.
func TestAlive(t *testing.T) {
	self, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	later, rebooted := self, self
	later.StartTime--
	rebooted.BootID = "another"
	zombie, cmd := startSleep(t)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, zombie)
	reaped, cmd := startSleep(t)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	for name, c := range map[string]struct {
		identity Identity
		want     bool
	}{
		"this process":         {self, true},
		"another start time":   {later, false},
		"another boot":         {rebooted, false},
		"a zombie":             {zombie, false},
		"no such process":      {reaped, false},
		"the zero of Identity": {Identity{}, false},
	} {
		if got := c.identity.Alive(); got != c.want {
			t.Errorf("%s: alive %v, want %v", name, got, c.want)
		}
		if err := c.identity.Check(); (err == nil) != c.want || err != nil && !errors.Is(err, ErrEnded) {
			t.Errorf("%s: Check says %v", name, err)
		}
	}
}

// TestAliveWithoutDescriptors: a process that cannot open files does not take a process that runs for one that has
// ended, and touches no process that it cannot identify. A child of this process has the low limit.
func TestAliveWithoutDescriptors(t *testing.T) {
	const inChild = "PROCESS_TEST_LOW_LIMIT"
	if os.Getenv(inChild) != "" {
		checkWithoutDescriptors(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestAliveWithoutDescriptors$")
	cmd.Env = append(os.Environ(), inChild+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func checkWithoutDescriptors(t *testing.T) {
	self, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	other, cmd := startSleep(t)
	warm, err := other.Exit() // the Go runtime opens what it needs to poll a pidfd
	if err != nil {
		t.Fatal(err)
	}
	warm.Close()

	limitDescriptors(t, 0)
	if !self.Alive() || !other.Alive() {
		t.Errorf("with no descriptor free, this process is alive: %v, another one: %v", self.Alive(), other.Alive())
	}
	if err := self.Check(); !errors.Is(err, unix.EMFILE) || errors.Is(err, ErrEnded) {
		t.Errorf("with no descriptor free, Check says %v", err)
	}
	if found, err := Find(); !errors.Is(err, unix.EMFILE) {
		t.Errorf("with no descriptor free, Find returns %v, %v", found, err)
	}
	for free := range 2 { // with one, the pidfd is opened, and then the process is not identified
		limitDescriptors(t, free)
		if err := other.Kill(t.Context()); !errors.Is(err, unix.EMFILE) {
			t.Errorf("%d descriptors free: Kill says %v", free, err)
		}
		if _, err := other.Exit(); !errors.Is(err, unix.EMFILE) || errors.Is(err, ErrEnded) {
			t.Errorf("%d descriptors free: Exit says %v", free, err)
		}
	}
	limitDescriptors(t, 100)
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it ends by a signal
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != unix.SIGTERM {
		t.Errorf("a process that could not be identified was killed: %v", cmd.ProcessState)
	}
	last, _ := startSleep(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := last.Kill(ctx); err != nil || last.Alive() {
		t.Errorf("with descriptors, Kill says %v; alive: %v", err, last.Alive())
	}
}

// limitDescriptors lets this process open that many descriptors more, and no others.
func limitDescriptors(t *testing.T, free int) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	lowest, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(lowest)
	limit.Cur = uint64(lowest + free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
}

// startSleep starts a process that sleeps until the test ends.
func startSleep(t *testing.T) (Identity, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // fails if it was waited for
		_ = cmd.Wait()
	})
	identity, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return identity, cmd
}

// awaitEnd waits until a process has ended. Nobody needs to wait for it.
func awaitEnd(t *testing.T, identity Identity) {
	t.Helper()
	h, err := Open(identity.PID)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := h.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}
