// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// stop is a stop of a seized thread, see 'Stopped states' in ptrace(2).
type stop struct {
	kind stopKind
	info siginfo
}

type stopKind int

const (
	// stopEvent is PTRACE_EVENT_STOP, because of PTRACE_INTERRUPT or a SIGSTOP of the process. The
	// thread is in get_signal() of kernel/signal.c: pending signals and the restart of an interrupted call
	// come after it.
	stopEvent stopKind = iota
	stopSyscall
	stopSignal // a signal is about to be delivered; it is lost unless the thread is resumed with it
)

// currentStop asks ptrace whether and how the thread is stopped. The error is ESRCH if it is not.
//
// wait(2) would return the same, but only once, and another waiter in our process may have got it.
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

// isSeccompTrap reports whether the signal is the answer of SECCOMP_RET_TRAP to a system call.
func (si siginfo) isSeccompTrap() bool {
	const sysSeccomp = 1 // SYS_SECCOMP of asm-generic/siginfo.h
	return si.signo == int32(unix.SIGSYS) && si.code == sysSeccomp
}

// signalFor returns the signal with which to resume the thread from s, so that no signal is lost or added.
//
// While our call runs, only SIGSYS and SIGSTOP can arrive here. A SIGSYS that seccomp sent is for our call, and is
// dropped. Any other SIGSYS is sent again when the thread is restored.
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
// It polls, because a context cannot end a blocking wait(2). The first rounds only yield the
// CPU, because a stop usually takes microseconds.
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

// hasEnded reports whether a thread that we trace is dead. If so, it ends the tracing.
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
	// The real parent learns of the death only after the tracer has waited for it. If we are the parent ourselves,
	// leave the exit status for the caller of Wait.
	if st, err := readStatus(tid); err == nil && st.parent != unix.Getpid() {
		_, _ = unix.Wait4(tid, nil, unix.WNOHANG|unix.WALL|unix.WNOTHREAD, nil) // ECHILD: already seen
	}
	return true
}
