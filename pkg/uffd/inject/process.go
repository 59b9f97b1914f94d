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

// The bounds that hold even if the caller's context has none.
const (
	// stopLimit: how long a thread may take to stop. Only uninterruptible sleep makes it longer than a
	// millisecond.
	stopLimit = 5 * time.Second
	// callLimit: how long an injected call may run before it is interrupted.
	callLimit = 5 * time.Second
	// restoreLimit: how long to wait for an injected call that does not return, before the caller is told so.
	restoreLimit = 5 * time.Second
	// maxStops: how many other stops (SIGSTOP, SIGCONT, group stop) may come in between those we wait for.
	maxStops = 1000
)

// Process is a thread of another process, stopped by us so that it can run system calls on our behalf. The
// other threads of that process run on. Its methods may be called from any goroutine; one at a time takes
// effect.
type Process struct {
	tid    int
	insn   uint64 // address of a system call instruction
	tracer *thread

	mu   sync.Mutex
	done error // why this Process can no longer be used; nil: it can

	restoreLimit time.Duration // the constant of this name

	// Owned by the tracer's thread.
	injecting bool // between prepare and restore
	postponed bool // a SIGSYS has to be sent again
}

var errDetached = errors.New("process is detached")

// Seize stops thread tid (for a process: its main thread, whose number is the process') and takes control of
// it. The caller must call Detach. Errors: ErrPtraceDenied, ErrAlreadyTraced, ErrProcessGone, ErrUnsupported,
// or the context's if the thread did not stop in time (at most 5 seconds); in each case the process is as it
// was before.
func Seize(ctx context.Context, tid int) (*Process, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	p := &Process{tid: tid, tracer: startThread(), restoreLimit: restoreLimit}
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
	// Another tracer that lets go between our attempt and the look at TracerPid would be mistaken for a missing
	// permission: in that case there is nothing in the way any more, so just try again.
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

// stopFirst brings a freshly seized thread to a stopEvent and looks whether it is one that we can use.
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
	p.insn, err = findSyscallInstruction(p.tid)
	return err
}

// deliverOwnTrap lets the thread have a SIGSYS that a seccomp filter sent it for a call of its own just before
// we came, since later it could not be told from one for our call.
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

// settle brings the thread to a stopEvent from wherever it is, delivering signals it meets on the way. A system
// call that has not begun yet is skipped (settle is called at an entry stop only after something went wrong).
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
		// Again, because any stop takes back an interrupt that is still due (ptrace_stop in kernel/signal.c).
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

// forgetCall makes the kernel neither execute (at an entry stop) nor restart (at an exit stop) the current
// call.
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

// died makes ErrProcessGone of the ESRCH that ptrace answers once the thread was killed under our hands.
func (p *Process) died(err error) error {
	if errors.Is(err, unix.ESRCH) {
		hasEnded(p.tid) // releases it
		return ErrProcessGone
	}
	return err
}

// Detach lets the thread continue exactly where it was. It returns ErrProcessGone if the process has died
// meanwhile. The Process cannot be used afterwards; a second Detach does nothing.
func (p *Process) Detach() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case errors.Is(p.done, errDetached):
		return nil
	case p.done != nil:
		return p.done // ErrNotRestored: the background job detaches
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
