// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// TestSignalsArriveOnce checks that signals sent while the thread is held arrive afterwards, each once. SIGRTMIN is
// queued, so that they can be counted.
func TestSignalsArriveOnce(t *testing.T) {
	for _, mode := range []string{"read", "busy"} {
		t.Run(mode, func(t *testing.T) {
			v := startVictim(t, mode)
			const rounds, perRound, sigrtmin = 50, 4, 34 // glibc uses 32 and 33 itself
			for range rounds {
				stop := make(chan error)
				go func() { // at any moment of the injection
					for range perRound {
						if err := unix.Tgkill(v.pid, v.pid, sigrtmin); err != nil {
							stop <- err
							return
						}
					}
					stop <- nil
				}()
				injectGetpid(t, v.pid)
				if err := <-stop; err != nil {
					t.Fatal(err)
				}
			}
			v.poke()
			if got, want := v.line(), fmt.Sprintf("ret=1 errno=0 signals=%d", rounds*perRound); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

// TestSignalStillInterrupts checks that a handler without SA_RESTART ends the call, as it does without an injected
// call. epoll_wait is the call whose result we change (keepCallGoing).
func TestSignalStillInterrupts(t *testing.T) {
	for _, mode := range []string{"epoll", "ppoll", "pause", "futex", "nanosleep-long"} {
		t.Run(mode, func(t *testing.T) {
			v := startVictim(t, mode)
			eventually(t, "target is asleep", func() bool { return v.state() == 'S' && blockedIn(v.pid) > 0 })
			p, err := Seize(t.Context(), v.pid)
			if err != nil {
				t.Fatal(err)
			}
			// Send it to this thread: while it is held, the kernel gives signals of the process to another thread.
			if err := unix.Tgkill(v.pid, v.pid, unix.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			_, err = p.Syscall(t.Context(), unix.SYS_GETPID)
			if err := errors.Join(err, p.Detach()); err != nil {
				t.Fatal(err)
			}
			if got, want := v.line(), "ret=-1 errno=4 signals=1"; got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

func TestStoppedProcessStaysStopped(t *testing.T) {
	v := startVictim(t, "ppoll")
	v.awaitBlocked(unix.SYS_PPOLL)
	mustKill(t, v.pid, unix.SIGSTOP)
	eventually(t, "target is stopped", func() bool { return v.state() == 'T' })
	for range 5 {
		injectGetpid(t, v.pid)
		eventually(t, "target is stopped again", func() bool { return v.state() == 'T' })
	}
	v.wantUntraced()
	mustKill(t, v.pid, unix.SIGCONT)
	v.awaitBlocked(unix.SYS_PPOLL)
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestStopAndContinueWhileHeld stops and continues the process while the thread is held, before the call.
func TestStopAndContinueWhileHeld(t *testing.T) {
	tests := []struct {
		name    string
		signals []unix.Signal
		state   byte
	}{
		{"stop", []unix.Signal{unix.SIGSTOP}, 'T'},
		{"stop and continue", []unix.Signal{unix.SIGSTOP, unix.SIGCONT}, 'S'},
		{"continue and stop", []unix.Signal{unix.SIGCONT, unix.SIGSTOP}, 'T'},
		{"terminal stop", []unix.Signal{unix.SIGTSTP}, 'T'},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			v := startVictim(t, "ppoll")
			v.awaitBlocked(unix.SYS_PPOLL)
			p, err := Seize(t.Context(), v.pid)
			if err != nil {
				t.Fatal(err)
			}
			for _, sig := range test.signals {
				mustKill(t, v.pid, sig)
			}
			pid, err := p.Syscall(t.Context(), unix.SYS_GETPID)
			if err != nil || int(pid) != v.pid {
				t.Errorf("getpid: %d, %v", pid, err)
			}
			if err := p.Detach(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "target is in state "+string(test.state), func() bool { return v.state() == test.state })
			mustKill(t, v.pid, unix.SIGCONT)
			v.awaitBlocked(unix.SYS_PPOLL)
			v.poke()
			if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

func mustKill(t *testing.T, pid int, sig unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// TestBlockingCallIsInterrupted checks that a call that blocks ends with the context, and that the thread continues as
// before.
func TestBlockingCallIsInterrupted(t *testing.T) {
	v := startVictim(t, "ppoll")
	v.awaitBlocked(unix.SYS_PPOLL)
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for range 10000 {
			if blockedIn(v.pid) == unix.SYS_READ {
				break
			}
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := p.Syscall(ctx, unix.SYS_READ, 0, 0, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Syscall: %v", err)
	}
	if pid, err := p.Syscall(t.Context(), unix.SYS_GETPID); err != nil || int(pid) != v.pid {
		t.Errorf("the next call: %d, %v", pid, err)
	}
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	v.awaitBlocked(unix.SYS_PPOLL)
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestUninterruptibleSleep(t *testing.T) {
	v := startVictim(t, "vfork")
	eventually(t, "target is in uninterruptible sleep", func() bool { return v.state() == 'D' })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := Seize(ctx, v.pid)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "uninterruptible") {
		t.Errorf("Seize: %v", err)
	}
	v.wantUntraced()
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestCallThatHangs makes a call that hangs in the kernel. The caller gets ErrNotRestored, and the thread is restored
// when the call returns.
func TestCallThatHangs(t *testing.T) {
	v := startVictim(t, "ppoll")
	v.awaitBlocked(unix.SYS_PPOLL)
	taken := takeOrSkip(t, v.pid)
	defer taken.UFFD.Close()
	if _, _, err := taken.UFFD.API(0); err != nil {
		t.Fatal(err)
	}
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	page, err := p.Syscall(
		t.Context(), unix.SYS_MMAP,
		0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0), 0,
	)
	if err != nil {
		t.Fatal(err)
	}
	missing := uffd.Range{Start: uint64(page), Len: 4096}
	if _, err := taken.UFFD.Register(missing, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { // the thread hangs in the call once its fault can be read
		defer cancel()
		faults := uffd.NewEventBuffer(1)
		for range 60_000 {
			if n, _ := taken.UFFD.Read(faults); n > 0 { // otherwise it would block
				break
			}
			time.Sleep(time.Millisecond)
		}
	}()
	p.restoreLimit = 100 * time.Millisecond
	if _, err := p.Syscall(ctx, unix.SYS_GETTIMEOFDAY, page, 0); !errors.Is(err, ErrNotRestored) {
		t.Errorf("Syscall: %v", err)
	}
	if err := p.Detach(); !errors.Is(err, ErrNotRestored) {
		t.Errorf("Detach: %v", err)
	}
	if _, err := p.Syscall(t.Context(), unix.SYS_GETPID); !errors.Is(err, ErrNotRestored) {
		t.Errorf("next Syscall: %v", err)
	}
	if _, err := taken.UFFD.Zeropage(missing, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the thread is let go", func() bool {
		st, err := readStatus(v.pid)
		return err == nil && st.tracer == 0
	})
	v.awaitBlocked(unix.SYS_PPOLL)
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestWithWaiterInSameProcess has another goroutine of this process wait for the target. It sees our stops (see the
// package comment).
func TestWithWaiterInSameProcess(t *testing.T) {
	v := startVictim(t, "read")
	waited := make(chan error, 1)
	go func() {
		_, err := v.cmd.Process.Wait()
		waited <- err
	}()
	for range 20 {
		injectGetpid(t, v.pid)
	}
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
}
