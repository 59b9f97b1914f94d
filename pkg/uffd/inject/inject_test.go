// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package inject

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// injectGetpid makes the target call getpid(2), whose answer is known.
func injectGetpid(t testing.TB, pid int) {
	t.Helper()
	p, err := Seize(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Syscall(t.Context(), unix.SYS_GETPID)
	if err := errors.Join(err, p.Detach()); err != nil {
		t.Fatal(err)
	}
	if int(got) != pid {
		t.Fatalf("getpid in process %d returned %d", pid, got)
	}
}

func wantNil(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func TestBlockedCallContinues(t *testing.T) {
	tests := []struct {
		mode  string
		calls []int // system calls in which it sleeps before and after
		want  string
	}{
		{"read", []int{unix.SYS_READ}, "ret=1 errno=0 signals=0"},
		{"ppoll", []int{unix.SYS_PPOLL}, "ret=1 errno=0 signals=0"},
		{"ppoll-mask", []int{unix.SYS_PPOLL}, "ret=1 errno=0 signals=0"},
		{"poll-timeout", []int{unix.SYS_POLL, unix.SYS_RESTART_SYSCALL}, "ret=1 errno=0 signals=0"},
		{"epoll", []int{unix.SYS_EPOLL_WAIT}, "ret=1 errno=0 signals=0"},
		{"epoll-timeout", []int{unix.SYS_EPOLL_WAIT}, "ret=1 errno=0 signals=0"},
		{"futex", []int{unix.SYS_FUTEX}, "ret=0 errno=0 signals=0"},
		{"futex-timeout", []int{unix.SYS_FUTEX, unix.SYS_RESTART_SYSCALL}, "ret=0 errno=0 signals=0"},
		{"semop", []int{unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP}, "ret=0 errno=0 signals=0"},
	}
	for _, test := range tests {
		t.Run(test.mode, func(t *testing.T) {
			v := startVictim(t, test.mode)
			for range 5 {
				v.awaitBlocked(test.calls...)
				injectGetpid(t, v.pid)
			}
			v.awaitBlocked(test.calls...)
			v.wantUntraced()
			v.poke()
			if got := v.line(); got != test.want {
				t.Errorf("after the injections: %q, want %q", got, test.want)
			}
		})
	}
}

// TestSeizeAndDetach checks that the process is not disturbed without an injected call, either.
func TestSeizeAndDetach(t *testing.T) {
	v := startVictim(t, "epoll")
	v.awaitBlocked(unix.SYS_EPOLL_WAIT)
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	if err := p.Detach(); err != nil {
		t.Errorf("second Detach: %v", err)
	}
	if _, err := p.Syscall(t.Context(), unix.SYS_GETPID); err == nil {
		t.Error("Syscall after Detach succeeded")
	}
	v.awaitBlocked(unix.SYS_EPOLL_WAIT)
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestNanosleepKeepsItsTime injects calls during a sleep of five seconds. If each restarted the sleep from the
// beginning, it would not end while they continue.
func TestNanosleepKeepsItsTime(t *testing.T) {
	v := startVictim(t, "nanosleep")
	result := make(chan string)
	go func() { result <- v.line() }()
	v.awaitBlocked(unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP)
	for n := 0; ; n++ {
		select {
		case got := <-result:
			if want := "ret=0 errno=0 signals=0"; got != want {
				t.Errorf("%q, want %q", got, want)
			}
			if n < 3 {
				t.Errorf("only %d injections hit the sleep", n)
			}
			return
		case <-time.After(20 * time.Millisecond):
		}
		p, err := Seize(t.Context(), v.pid)
		if errors.Is(err, ErrProcessGone) {
			continue // it ended after the list was made
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = p.Syscall(t.Context(), unix.SYS_GETPID)
		if err := errors.Join(err, p.Detach()); err != nil && !errors.Is(err, ErrProcessGone) {
			t.Fatal(err)
		}
	}
}

func TestResultsAndErrno(t *testing.T) {
	v := startVictim(t, "read")
	p, err := Seize(t.Context(), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { wantNil(t, p.Detach()) }()
	if _, err := p.Syscall(t.Context(), unix.SYS_CLOSE, 9999); err != unix.EBADF {
		t.Errorf("close(9999): %v, want EBADF", err)
	}
	// mmap(2) of an anonymous private page needs all six arguments.
	addr, err := p.Syscall(
		t.Context(), unix.SYS_MMAP, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0), 0,
	)
	if err != nil || addr&4095 != 0 {
		t.Errorf("mmap: %#x, %v", addr, err)
	}
	if _, err := p.Syscall(
		t.Context(), unix.SYS_MMAP, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0), 1,
	); err != unix.EINVAL {
		t.Errorf("mmap at offset 1: %v, want EINVAL", err)
	}
}

// BenchmarkSyscall measures the time of one injected call in a stopped thread.
func BenchmarkSyscall(b *testing.B) {
	v := startVictim(b, "ppoll")
	p, err := Seize(b.Context(), v.pid)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { wantNil(b, p.Detach()) }()
	for b.Loop() {
		if _, err := p.Syscall(b.Context(), unix.SYS_GETPID); err != nil {
			b.Fatal(err)
		}
	}
}

func TestRegistersSurvive(t *testing.T) {
	v := startVictim(t, "busy")
	for range 200 {
		injectGetpid(t, v.pid)
	}
	v.wantUntraced()
	v.poke()
	if got, want := v.line(), "ret=1 errno=0 signals=0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
