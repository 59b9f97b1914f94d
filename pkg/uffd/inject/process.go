// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Limits that hold even if the caller's context has no deadline.
const (
	// stopLimit is how long a thread may take to stop. More than a millisecond means uninterruptible sleep.
	stopLimit = 5 * time.Second
	// callLimit is how long an injected call may run before it is interrupted.
	callLimit = 5 * time.Second
	// restoreLimit is how long to wait for an injected call that does not return, before the caller gets the error.
	restoreLimit = 5 * time.Second
	// maxStops is how many other stops (SIGSTOP, SIGCONT, group stop) may come before the one that we wait for.
	maxStops = 1000
)

// Process is a thread of another process. We stopped it so that it can run system calls for us. The
// other threads of that process continue to run. Its methods may be called from any goroutine; they run one at a
// time.
type Process struct {
	tid    int
	code   code // what an injected call runs
	tracer *thread

	mu   sync.Mutex
	done error // why this Process can no longer be used; nil while it can

	restoreLimit time.Duration // the constant of this name
	// Tests replace these functions.
	setRegs func(tid int, r *regs) error // restores the registers
	reached func(point string)           // called between the steps of an injected call

	// Owned by the tracer's thread.
	injecting bool // between prepare and restore
	postponed bool // a SIGSYS has to be sent again
}

var errDetached = errors.New("process is detached")

// Seize stops thread tid and takes control of it. The number of a process is that of its main thread. The caller must
// call Detach. Errors: ErrPtraceDenied, ErrAlreadyTraced, ErrProcessGone, ErrUnsupported,
// or the context's if the thread did not stop in time (at most 5 seconds). After an error the process is as it
// was before.
func Seize(ctx context.Context, tid int) (*Process, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	p := &Process{
		tid: tid, tracer: startThread(), restoreLimit: restoreLimit,
		setRegs: setRegs, reached: func(string) {},
	}
	attached := false
	err := p.tracer.do(func() error {
		if err := attach(tid); err != nil {
			return err
		}
		attached = true
		return p.stopFirst(ctx)
	})
	switch {
	case err == nil:
		return p, nil
	case attached:
		p.tracer.endByExit()
	default:
		p.tracer.end()
	}
	return nil, err
}

func attach(tid int) error {
	var err error
	// If another tracer detaches between our attempt and our look at TracerPid, the error looks like a missing
	// permission. The process is free then, so try again.
	for range 3 {
		if err = ptrace(unix.PTRACE_SEIZE, tid, 0, unix.PTRACE_O_TRACESYSGOOD); err == nil {
			return nil
		}
		err = seizeError(tid, err)
		if !errors.Is(err, ErrPtraceDenied) {
			break
		}
	}
	return err
}

// stopFirst brings a newly seized thread to a stopEvent and checks whether we can use the thread.
func (p *Process) stopFirst(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, stopLimit,
		fmt.Errorf("no stop within %v: %w", stopLimit, context.DeadlineExceeded))
	defer cancel()
	if err := p.settle(ctx); err != nil {
		return err
	}
	if err := p.deliverOwnTrap(ctx); err != nil {
		return err
	}
	r, err := getRegs(p.tid)
	if err != nil {
		return fmt.Errorf("read registers of thread %d: %w", p.tid, p.died(err))
	}
	if err := r.check(); err != nil {
		return fmt.Errorf("thread %d: %w", p.tid, err)
	}
	if r.keepCallGoing() {
		if err := setRegs(p.tid, &r); err != nil {
			return fmt.Errorf("write registers of thread %d: %w", p.tid, p.died(err))
		}
	}
	p.code, err = findCode(p.tid)
	return err
}

// deliverOwnTrap delivers a pending SIGSYS that a seccomp filter sent for one of the thread's own calls, just before
// Seize. Later it could not be distinguished from a SIGSYS for our call.
func (p *Process) deliverOwnTrap(ctx context.Context) error {
	trapped, err := p.seccompSignalPending()
	if err != nil || !trapped {
		return err
	}
	if err := p.runToSeccompSignal(ctx); err != nil {
		return err
	}
	return p.settle(ctx)
}

// settle brings the thread to a stopEvent from any state, and delivers the signals that arrive meanwhile. It skips a
// system call that has not begun yet: settle is called at an entry stop only after a failure.
func (p *Process) settle(ctx context.Context) error {
	if err := p.interrupt(); err != nil {
		return err
	}
	for range maxStops {
		s, err := waitStop(ctx, p.tid)
		if err != nil {
			return err
		}
		if s.kind == stopEvent {
			return nil
		}
		if s.kind == stopSyscall {
			if err := p.forgetCall(); err != nil {
				return err
			}
		}
		// Interrupt again, because every stop clears a pending interrupt (ptrace_stop in kernel/signal.c).
		if err := p.interrupt(); err != nil {
			return err
		}
		if err := ptrace(unix.PTRACE_CONT, p.tid, 0, p.signalFor(s)); err != nil {
			return fmt.Errorf("resume thread %d: %w", p.tid, p.died(err))
		}
	}
	return fmt.Errorf("thread %d does not come to rest: %d stops of other kinds", p.tid, maxStops)
}

func (p *Process) interrupt() error {
	if err := ptrace(unix.PTRACE_INTERRUPT, p.tid, 0, 0); err != nil {
		return fmt.Errorf("interrupt thread %d: %w", p.tid, p.died(err))
	}
	return nil
}

// forgetCall drops the current call: the kernel then neither executes it (at an entry stop) nor restarts it (at an exit
// stop).
func (p *Process) forgetCall() error {
	r, err := getRegs(p.tid)
	if err == nil {
		r.forgetCall()
		err = setRegs(p.tid, &r)
	}
	if err != nil {
		return fmt.Errorf("drop the system call of thread %d: %w", p.tid, p.died(err))
	}
	return nil
}

// died returns ErrProcessGone if err is ESRCH because the thread was killed. ptrace also answers ESRCH for a thread
// that is not stopped; died then returns err.
func (p *Process) died(err error) error {
	if !errors.Is(err, unix.ESRCH) {
		return err
	}
	for range 1000 { // a thread that was killed takes a moment before it is seen to end
		if hasEnded(p.tid) || isExiting(p.tid) {
			return ErrProcessGone
		}
		if _, stopErr := currentStop(p.tid); stopErr == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// Detach lets the thread continue where it was stopped. It returns ErrProcessGone if the process has died
// meanwhile. The Process cannot be used afterwards. A second Detach does nothing.
func (p *Process) Detach() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case errors.Is(p.done, errDetached):
		return nil
	case p.done != nil:
		return p.done // ErrNotRestored: restoreLater detaches
	}
	p.done = errDetached
	err := p.tracer.do(func() error { return ptrace(unix.PTRACE_DETACH, p.tid, 0, 0) })
	if err == nil {
		p.tracer.end()
		return nil
	}
	err = p.tracer.do(func() error { return p.died(err) })
	p.tracer.endByExit()
	return fmt.Errorf("detach from thread %d: %w", p.tid, err)
}
