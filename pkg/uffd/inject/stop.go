// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// stop is one of the ways in which a seized thread stands still, see 'Stopped states' in ptrace(2).
type stop struct {
	kind stopKind
	info siginfo
}

type stopKind int

const (
	// stopEvent: PTRACE_EVENT_STOP, by PTRACE_INTERRUPT or because the process is stopped by SIGSTOP. The
	// thread is inside get_signal() of kernel/signal.c: pending signals and the restart of an interrupted call
	// come after it.
	stopEvent stopKind = iota
	stopSyscall
	stopSignal // a signal is about to be delivered; it is lost unless the thread is resumed with it
)

// currentStop asks ptrace whether and how the thread is stopped; ESRCH if it is not.
//
// wait(2) would say the same, but its answer is given only once, and any other waiter in our process may have
// got it.
func currentStop(tid int) (stop, error) {
	info, err := getSiginfo(tid)
	if err != nil {
		return stop{}, err
	}
	switch {
	case info.code>>8 == unix.PTRACE_EVENT_STOP:
		return stop{stopEvent, info}, nil
	case info.signo == int32(unix.SIGTRAP) && info.code == int32(unix.SIGTRAP)|0x80: // PTRACE_O_TRACESYSGOOD
		return stop{stopSyscall, info}, nil
	}
	return stop{stopSignal, info}, nil
}

// isSeccompTrap says that the signal is the answer of SECCOMP_RET_TRAP to a system call.
func (si siginfo) isSeccompTrap() bool {
	const sysSeccomp = 1 // SYS_SECCOMP of asm-generic/siginfo.h
	return si.signo == int32(unix.SIGSYS) && si.code == sysSeccomp
}

// signalFor is the signal with which to resume the thread from s so that none is lost or added.
//
// While our own call runs, SIGSYS is the only one that can arrive here besides SIGSTOP. If seccomp sent it, it
// is ours and is dropped; if somebody else did, it is sent again when the thread is restored.
func (p *Process) signalFor(s stop) uintptr {
	switch {
	case s.kind != stopSignal:
		return 0
	case p.injecting && s.info.signo == int32(unix.SIGSYS):
		p.postponed = p.postponed || !s.info.isSeccompTrap()
		return 0
	}
	return uintptr(s.info.signo)
}

// waitStop waits until the thread is stopped.
//
// It polls. The alternative, a blocking wait(2), cannot be ended by a context. The first rounds only yield the
// CPU, since a stop usually takes microseconds.
func waitStop(ctx context.Context, tid int) (stop, error) {
	const yields = 100
	pause := 20 * time.Microsecond
	for round := 0; ; round++ {
		s, err := currentStop(tid)
		if err == nil || !errors.Is(err, unix.ESRCH) {
			return s, err
		}
		if hasEnded(tid) {
			return stop{}, ErrProcessGone
		}
		if ctx.Err() != nil {
			return stop{}, didNotStop(tid, context.Cause(ctx))
		}
		if round < yields {
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // cannot fail
			continue
		}
		time.Sleep(pause)
		pause = min(2*pause, 2*time.Millisecond)
	}
}

func didNotStop(tid int, cause error) error {
	st, err := readStatus(tid)
	if err != nil {
		return fmt.Errorf("thread %d did not stop: %w", tid, cause)
	}
	hint := ""
	if st.state == 'D' {
		hint = ": uninterruptible sleep, it waits for a disk, a network file system or a page that userfaultfd owes it"
	}
	return fmt.Errorf("thread %d did not stop (state %c%s): %w", tid, st.state, hint, cause)
}

// hasEnded says whether a thread we trace is dead, and if so releases it from us.
func hasEnded(tid int) bool {
	var info unix.Siginfo
	const look = unix.WEXITED | unix.WNOHANG | unix.WNOWAIT | unix.WALL
	if err := unix.Waitid(unix.P_PID, tid, &info, look, nil); err != nil {
		return errors.Is(err, unix.ECHILD)
	}
	const exited, killed, dumped = 1, 2, 3 // CLD_EXITED, CLD_KILLED, CLD_DUMPED
	if info.Signo == 0 || info.Code != exited && info.Code != killed && info.Code != dumped {
		return false // alive; a stop is reported here too, with another code
	}
	// The real parent learns of the death only when the tracer has seen it. If we are the parent ourselves, the
	// exit status belongs to whoever calls Wait for that child.
	if st, err := readStatus(tid); err == nil && st.parent != unix.Getpid() {
		_, _ = unix.Wait4(tid, nil, unix.WNOHANG|unix.WALL|unix.WNOTHREAD, nil) // ECHILD: already seen
	}
	return true
}
