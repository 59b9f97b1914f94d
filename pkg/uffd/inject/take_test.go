// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// takeOrSkip takes a userfaultfd, or skips the test. It needs root: the targets inherit our credentials.
func takeOrSkip(t testing.TB, pid int) *Taken {
	t.Helper()
	taken, err := Take(t.Context(), pid, TakeOptions{})
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return taken
}

func wantFound(t *testing.T, pid int, want ...int) {
	t.Helper()
	got, err := selectFDs(pid, func(fd int) bool { return checkUserfault(pid, fd) == nil })
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("process holds userfaultfds %v, want %v", got, want)
	}
}

// wantSupervision checks that a descriptor that another process made for us has the flag if our own ones have it. Its
// label may differ.
func wantSupervision(t *testing.T, taken *Taken) {
	t.Helper()
	ours, _, err := uffd.ProbeSupervision()
	if err != nil {
		t.Fatal(err)
	}
	state, label, err := taken.UFFD.Supervision()
	if err != nil || (state == uffd.Flagged) != (ours == uffd.Flagged) || (state == uffd.Labelled) && label == "" {
		t.Errorf("taken by %s it is %v, labelled %q (%v), and %v when we make one", taken.Method, state, label, err, ours)
	}
}

func TestTake(t *testing.T) {
	v := startVictim(t, "read")
	wantFound(t, v.pid)
	taken := takeOrSkip(t, v.pid)
	if taken.Method != MethodSyscall {
		t.Errorf("method %q", taken.Method)
	}
	wantFound(t, v.pid, taken.RemoteFD)
	wantSupervision(t, taken)
	if _, _, err := taken.UFFD.API(0); err != nil {
		t.Errorf("API: %v", err)
	}

	again, err := Duplicate(v.pid, taken.RemoteFD)
	if err != nil {
		t.Fatal(err)
	}
	// We may close our descriptor first: the process' own keeps the userfaultfd open, and a duplicate of it is the same.
	if err := taken.UFFD.Close(); err != nil {
		t.Fatal(err)
	}
	wantFound(t, v.pid, taken.RemoteFD)
	if err := again.CloseRemote(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFound(t, v.pid)
	if err := again.UFFD.Close(); err != nil {
		t.Fatal(err)
	}
	v.awaitBlocked(unix.SYS_READ)
	v.wantUntraced()
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCloseRemoteChecksFirst(t *testing.T) {
	v := startVictim(t, "read")
	if err := CloseRemote(t.Context(), v.pid, 0); !errors.Is(err, ErrNotUserfault) {
		t.Errorf("close of the target's stdin: %v", err)
	}
	if err := CloseRemote(t.Context(), v.pid, 999); !errors.Is(err, ErrNotUserfault) {
		t.Errorf("close of no descriptor: %v", err)
	}
	if _, err := Duplicate(v.pid, 0); !errors.Is(err, ErrNotUserfault) {
		t.Errorf("duplicate of the target's stdin: %v", err)
	}

	first, second := takeOrSkip(t, v.pid), takeOrSkip(t, v.pid)
	defer first.UFFD.Close()
	defer second.UFFD.Close()
	wrong := *first
	wrong.RemoteFD = second.RemoteFD // as if the number had been closed and given to another userfaultfd
	if err := wrong.CloseRemote(t.Context()); !errors.Is(err, ErrNotUserfault) {
		t.Errorf("close of another userfaultfd: %v", err)
	}
	wantFound(t, v.pid, first.RemoteFD, second.RemoteFD)
	if err := CloseRemote(t.Context(), v.pid, first.RemoteFD); err != nil {
		t.Error(err)
	}
	wantFound(t, v.pid, second.RemoteFD)
}

func TestSeccompFilter(t *testing.T) {
	for _, mode := range []string{"seccomp-trap", "seccomp-errno", "seccomp-kill"} {
		t.Run(mode, func(t *testing.T) {
			if mode == "seccomp-kill" && os.Geteuid() != 0 {
				testenv.CannotRun(t, "needs root to read the filter")
			}
			v := startVictim(t, mode)
			_, err := Take(t.Context(), v.pid, TakeOptions{})
			var takeErr *TakeError
			if !errors.As(err, &takeErr) || len(takeErr.Attempts) != 2 {
				t.Fatalf("both ways should have been tried: %v", err)
			}
			if mode != "seccomp-errno" && !errors.Is(err, ErrSeccomp) {
				t.Errorf("not recognized as seccomp: %v", err)
			}
			injectGetpid(t, v.pid)
			v.awaitBlocked(unix.SYS_READ)
			v.poke() // the target prints how many SIGSYS it got
			if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

// TestNothingStaysBehind checks that a descriptor that cannot be used does not stay open.
func TestNothingStaysBehind(t *testing.T) {
	v := startVictim(t, "read")
	pidfd, err := unix.PidfdOpen(v.pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	before := openFDs(t, v.pid)
	if _, err = (target{v.pid, pidfd}).take(
		t.Context(), MethodSyscall, unix.SYS_DUP, 0,
	); !errors.Is(err, ErrNotUserfault) {
		t.Errorf("dup(0) passed for a userfaultfd: %v", err)
	}
	if after := openFDs(t, v.pid); after != before {
		t.Errorf("the target has %d open descriptors, had %d", after, before)
	}
}

// TestCancelledCallLeavesNoDescriptor ends the context at different moments. Either the caller gets the descriptor, or
// there is none.
func TestCancelledCallLeavesNoDescriptor(t *testing.T) {
	v := startVictim(t, "read")
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	cancelled := 0
	for i := range 60 {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(time.Duration(i) * 5 * time.Microsecond) // to hit different moments
			cancel()
		}()
		fd, err := p.Syscall(ctx, unix.SYS_USERFAULTFD, newFlags)
		switch {
		case err == nil:
			got = append(got, int(fd))
		case errors.Is(err, context.Canceled):
			cancelled++
		case errors.Is(err, unix.EPERM):
			testenv.CannotRun(t, "needs root: %v", err)
		default:
			t.Fatal(err)
		}
		cancel()
	}
	t.Logf("%d of 60 calls were cancelled in time", cancelled)
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	wantFound(t, v.pid, got...)
}

func openFDs(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestDeviceNotAvailable(t *testing.T) {
	v := startVictim(t, "seccomp-errno")
	refuse := errors.New("no QMP today")
	_, err := Take(t.Context(), v.pid, TakeOptions{HandDevice: func(
		context.Context, *os.File,
	) (func(context.Context) error, error) {
		return nil, refuse
	}})
	if _, statErr := os.Stat(uffd.DevicePath); statErr != nil {
		testenv.CannotRun(t, "no device: %v", statErr)
	}
	if !errors.Is(err, refuse) || !errors.Is(err, unix.EPERM) {
		t.Errorf("error does not tell both reasons: %v", err)
	}
	for _, want := range []string{MethodSyscall, MethodDevice, "vm.unprivileged_userfaultfd"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not mention %s", err, want)
		}
	}
	wantFound(t, v.pid)
}

func BenchmarkTake(b *testing.B) {
	v := startVictim(b, "ppoll")
	v.awaitBlocked(unix.SYS_PPOLL)
	for b.Loop() {
		taken := takeOrSkip(b, v.pid)
		b.StopTimer()
		if err := errors.Join(taken.CloseRemote(b.Context()), taken.UFFD.Close()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkTakeUp measures how long a daemon that was started again needs for the descriptor. It may duplicate the
// process' own. Or it may have received one, and then proves that it is the same as the process' own.
func BenchmarkTakeUp(b *testing.B) {
	v := startVictim(b, "ppoll")
	taken := takeOrSkip(b, v.pid)
	defer taken.UFFD.Close()
	b.Run("duplicate", func(b *testing.B) {
		for b.Loop() {
			again, err := Duplicate(v.pid, taken.RemoteFD)
			if err != nil {
				b.Fatal(err)
			}
			if err := again.UFFD.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("proof", func(b *testing.B) {
		for b.Loop() {
			if err := sameFile(v.pid, taken.RemoteFD, taken.UFFD.FD()); err != nil {
				b.Fatal(err)
			}
		}
	})
}
