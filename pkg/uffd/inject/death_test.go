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
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
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
		go func() { // read(0) blocks, because nobody writes; while it blocks, the state is S and not t
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

// points are the points of an injected call at which the tracer can die, in their order.
var points = []string{"saved", "set", "masked", "entered", "returned", "unmasked", "restored"}

// TestTracerDies kills the tracer at each point. The thread continues as if it had never been traced.
func TestTracerDies(t *testing.T) {
	if pid, err := strconv.Atoi(os.Getenv("INJECT_TEST_HOLD")); err == nil {
		dieAsTracer(t, pid, os.Getenv("INJECT_TEST_POINT"))
	}
	start := func(t *testing.T, pid int, point string) *exec.Cmd {
		t.Helper()
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestTracerDies$", "-test.timeout="+patience.String())
		cmd.Env = append(os.Environ(), fmt.Sprintf("INJECT_TEST_HOLD=%d", pid), "INJECT_TEST_POINT="+point)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	killed := func(t *testing.T, tracer *exec.Cmd) {
		t.Helper()
		if err := tracer.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Fatalf("the tracer ended with %v", err)
		}
	}
	// goesOn sends v a signal, and then what its call waits for. The call must be blocked again by then: a futex whose
	// word has changed before fails with EAGAIN, rightly.
	goesOn := func(t *testing.T, v *victim, want string, calls ...int) {
		t.Helper()
		v.wantUntraced()
		if err := unix.Tgkill(v.pid, v.pid, 34); err != nil { // SIGRTMIN of glibc: it is not blocked
			t.Fatal(err)
		}
		eventually(t, "the signal is handled", func() bool { return !v.pending(34) })
		v.awaitBlocked(calls...)
		v.poke()
		if got := v.line(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	t.Run("while it holds the thread", func(t *testing.T) {
		v := startVictim(t, "read")
		v.awaitBlocked(unix.SYS_READ)
		tracer := start(t, v.pid, "held")
		eventually(t, "target is held", func() bool { return v.state() == 't' })
		_ = tracer.Process.Kill()
		killed(t, tracer)
		v.awaitBlocked(unix.SYS_READ)
		goesOn(t, v, "ret=1 errno=0 signals=1", unix.SYS_READ)
	})
	t.Run("while a call runs", func(t *testing.T) {
		v := startVictim(t, "futex")
		v.awaitBlocked(unix.SYS_FUTEX)
		tracer := start(t, v.pid, "blocked")
		v.awaitBlocked(unix.SYS_PPOLL)
		_ = tracer.Process.Kill()
		killed(t, tracer)
		v.awaitBlocked(unix.SYS_FUTEX) // the injected call has ended by then
		goesOn(t, v, "ret=0 errno=0 signals=1", unix.SYS_FUTEX)
	})
	for _, point := range points {
		for _, test := range []struct {
			mode  string
			calls []int // in which it is blocked
			want  string
		}{
			{"read", []int{unix.SYS_READ}, "ret=1 errno=0 signals=1"},
			{"busy", nil, "ret=1 errno=0 signals=1"},
			{"futex", []int{unix.SYS_FUTEX}, "ret=0 errno=0 signals=1"},
		} {
			t.Run(test.mode+" "+point, func(t *testing.T) {
				v := startVictim(t, test.mode)
				for range 5 {
					v.awaitBlocked(test.calls...)
					killed(t, start(t, v.pid, point))
				}
				goesOn(t, v, test.want, test.calls...)
			})
		}
	}
	for _, point := range points {
		t.Run("sequence "+point, func(t *testing.T) {
			v := startVictim(t, "rseq")
			if v.line() == "no rseq" {
				testenv.CannotRun(t, "the C library does not use rseq")
			}
			for range 5 {
				killed(t, start(t, v.pid, point))
			}
			goesOn(t, v, "ret=1 errno=0 signals=1")
		})
	}
	t.Run("nanosleep returned", func(t *testing.T) { // this call cannot be continued
		v := startVictim(t, "nanosleep-long")
		v.awaitBlocked(unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP)
		killed(t, start(t, v.pid, "returned"))
		if got, want := v.line(), "ret=-1 errno=4 signals=0"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	})
}

// dieAsTracer seizes process pid and kills this process at that point.
func dieAsTracer(t *testing.T, pid int, point string) {
	t.Helper()
	p, err := Seize(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	p.reached = func(at string) {
		if at == point {
			_ = unix.Kill(unix.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	switch point {
	case "held":
		<-t.Context().Done() // until killed
	case "blocked": // the call blocks for 3 s; this process is killed meanwhile
		page, err := p.Syscall(
			t.Context(), unix.SYS_MMAP,
			0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0), 0,
		)
		if err == nil {
			err = p.poke(page, []byte{0: 3, 15: 0}) // a struct timespec
		}
		if err != nil {
			t.Fatal(err)
		}
		_, _ = p.Syscall(t.Context(), unix.SYS_PPOLL, 0, 0, page, 0)
	default:
		_, _ = p.Syscall(t.Context(), unix.SYS_GETPID)
	}
}

// TestRestoreIsRepeated checks that a thread whose registers cannot be written for a while is restored later.
func TestRestoreIsRepeated(t *testing.T) {
	v := startVictim(t, "ppoll")
	v.awaitBlocked(unix.SYS_PPOLL)
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	failures := []error{unix.EINTR, unix.ESRCH, unix.EIO}
	p.setRegs = func(tid int, r *regs) error {
		if len(failures) == 0 {
			return setRegs(tid, r)
		}
		err := failures[0]
		failures = failures[1:]
		return err
	}
	pid, err := p.Syscall(t.Context(), unix.SYS_GETPID)
	if err != nil || int(pid) != v.pid || len(failures) > 0 {
		t.Errorf("Syscall = %d, %v; %d failures were not met", pid, err, len(failures))
	}
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestThreadIsHeldUntilRestored checks that a thread stays stopped while its registers cannot be written, and is
// detached only after they could be.
func TestThreadIsHeldUntilRestored(t *testing.T) {
	v := startVictim(t, "busy")
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	p.restoreLimit = time.Second // the first call of setRegs, which fails, comes within it
	var mayWrite atomic.Bool
	tried := make(chan struct{}, 1)
	p.setRegs = func(tid int, r *regs) error {
		if mayWrite.Load() {
			return setRegs(tid, r)
		}
		select {
		case tried <- struct{}{}:
		default:
		}
		return unix.EIO
	}
	pid, err := p.Syscall(t.Context(), unix.SYS_GETPID)
	if !errors.Is(err, ErrNotRestored) || !errors.Is(err, unix.EIO) || int(pid) != v.pid {
		t.Errorf("Syscall = %d, %v", pid, err)
	}
	if err := p.Detach(); !errors.Is(err, ErrNotRestored) {
		t.Errorf("Detach: %v", err)
	}
	for range 3 { // the tracer's thread keeps trying
		<-tried
		if st, err := readStatus(v.pid); err != nil || st.tracer == 0 || st.state == 'Z' {
			t.Errorf("the target is let go: %+v, %v", st, err)
		}
	}
	mayWrite.Store(true)
	eventually(t, "the thread is let go", func() bool {
		st, err := readStatus(v.pid)
		return err == nil && st.tracer == 0
	})
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestHeldThreadDies checks that the attempts to restore a held thread end when the thread dies.
func TestHeldThreadDies(t *testing.T) {
	v := startVictim(t, "ppoll")
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	p.restoreLimit = 50 * time.Millisecond
	p.setRegs = func(int, *regs) error { return unix.EIO }
	if _, err := p.Syscall(t.Context(), unix.SYS_GETPID); !errors.Is(err, ErrNotRestored) {
		t.Errorf("Syscall: %v", err)
	}
	mustKill(t, v.pid, unix.SIGKILL)
	<-p.tracer.ended
	if err := v.cmd.Wait(); !strings.Contains(err.Error(), "killed") {
		t.Errorf("its parent sees %v instead of the kill", err)
	}
}
