// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDeath(t *testing.T) {
	ctx := t.Context()
	t.Run("before", func(t *testing.T) {
		v := startVictim(t, "read")
		mustKill(t, v.pid, unix.SIGKILL)
		eventually(t, "target is a zombie", func() bool { return v.state() == 'Z' })
		if _, err := Seize(ctx, v.pid); !errors.Is(err, ErrProcessGone) || !errors.Is(err, unix.ESRCH) {
			t.Errorf("Seize of a zombie: %v", err)
		}
	})
	t.Run("while held", func(t *testing.T) {
		v := startVictim(t, "read")
		p, err := Seize(ctx, v.pid)
		if err != nil {
			t.Fatal(err)
		}
		mustKill(t, v.pid, unix.SIGKILL)
		if _, err := p.Syscall(ctx, unix.SYS_GETPID); !errors.Is(err, ErrProcessGone) {
			t.Errorf("Syscall: %v", err)
		}
		if err := p.Detach(); !errors.Is(err, ErrProcessGone) {
			t.Errorf("Detach: %v", err)
		}
		if err := v.cmd.Wait(); !strings.Contains(err.Error(), "killed") {
			t.Errorf("its parent sees %v instead of the kill", err)
		}
	})
	t.Run("in the call", func(t *testing.T) {
		v := startVictim(t, "ppoll")
		p, err := Seize(ctx, v.pid)
		if err != nil {
			t.Fatal(err)
		}
		go func() { // read(0) blocks, since nobody writes; while it blocks the state is S and not t
			for range 10000 {
				if blockedIn(v.pid) == unix.SYS_READ {
					break
				}
				time.Sleep(time.Millisecond)
			}
			_ = unix.Kill(v.pid, unix.SIGKILL)
		}()
		if _, err := p.Syscall(ctx, unix.SYS_READ, 0, 0, 1); !errors.Is(err, ErrProcessGone) {
			t.Errorf("Syscall: %v", err)
		}
		if err := p.Detach(); !errors.Is(err, ErrProcessGone) {
			t.Errorf("Detach: %v", err)
		}
	})
	t.Run("by the call", func(t *testing.T) {
		v := startVictim(t, "ppoll")
		p, err := Seize(ctx, v.pid)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Syscall(ctx, unix.SYS_EXIT_GROUP, 3); !errors.Is(err, ErrProcessGone) {
			t.Errorf("Syscall: %v", err)
		}
		_ = p.Detach()
		if err := v.cmd.Wait(); err == nil || err.Error() != "exit status 3" {
			t.Errorf("its parent sees %v", err)
		}
	})
	t.Run("no such process", func(t *testing.T) {
		if _, err := Seize(ctx, 1<<22-1); !errors.Is(err, ErrProcessGone) {
			t.Error(err)
		}
	})
}

// The death of the tracer, at the two moments that differ.
func TestTracerDies(t *testing.T) {
	if pid, err := strconv.Atoi(os.Getenv("INJECT_TEST_HOLD")); err == nil {
		p, err := Seize(t.Context(), pid)
		if err != nil {
			t.Fatal(err)
		}
		if os.Getenv("INJECT_TEST_CALL") != "" {
			_, _ = p.Syscall(t.Context(), unix.SYS_READ, 0, 0, 1) // blocks
		}
		<-t.Context().Done() // until killed
	}
	start := func(t *testing.T, pid int, env ...string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestTracerDies$", "-test.timeout=30s")
		cmd.Env = append(append(os.Environ(), fmt.Sprintf("INJECT_TEST_HOLD=%d", pid)), env...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	kill := func(cmd *exec.Cmd) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Run("while it holds the thread", func(t *testing.T) {
		v := startVictim(t, "ppoll")
		v.awaitBlocked(unix.SYS_PPOLL)
		tracer := start(t, v.pid)
		eventually(t, "target is held", func() bool { return v.state() == 't' })
		kill(tracer)
		v.awaitBlocked(unix.SYS_PPOLL)
		v.wantUntraced()
		v.poke()
		if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	})
	t.Run("while a call runs", func(t *testing.T) {
		v := startVictim(t, "ppoll")
		v.awaitBlocked(unix.SYS_PPOLL)
		tracer := start(t, v.pid, "INJECT_TEST_CALL=1")
		v.awaitBlocked(unix.SYS_READ)
		kill(tracer)
		if err := v.cmd.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Errorf("target ended with %v: it must be killed, not run on with our registers", err)
		}
	})
}
