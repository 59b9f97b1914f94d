// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// before is the state of the thread that an injected call changes and that has to be restored.
type before struct {
	regs regs
	mask sigset
	rseq rseqState

	frame uint64 // address of the signal frame from which the thread can restore itself
}

// Syscall makes the thread execute one system call and returns its result. An error that the kernel returned to the
// thread is a unix.Errno. A seccomp filter may cause ErrSeccomp or ErrProcessGone. Pointer
// arguments are addresses in the other process.
//
// When ctx ends, or after 5 seconds, a call that still blocks is interrupted, and the error is the
// context's. When Syscall returns, the thread is back in its former state, unless the error is ErrNotRestored, which
// says what happens to the thread. With ErrNotRestored, the result is still that of the call, if it has returned.
func (p *Process) Syscall(ctx context.Context, nr uintptr, args ...uintptr) (uintptr, error) {
	if len(args) > 6 {
		return 0, fmt.Errorf("system call %d with %d arguments: the kernel takes 6", nr, len(args))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done != nil {
		return 0, p.done
	}
	ctx, cancel := context.WithTimeoutCause(ctx, callLimit,
		fmt.Errorf("system call %d takes longer than %v: %w", nr, callLimit, context.DeadlineExceeded))
	defer cancel()
	var result uintptr
	err := p.tracer.do(func() error {
		var err error
		result, err = p.syscall(ctx, nr, args)
		return err
	})
	if errors.Is(err, ErrNotRestored) {
		p.done = err
	}
	return result, err
}

// syscall runs on the tracer's thread.
//
// It uses PTRACE_SYSCALL and not PTRACE_SINGLESTEP, because (1) the entry stop shows which call is about to
// run, (2) a single step ends with a SIGTRAP that the kernel forces, and forcing a blocked signal resets its
// handler to SIG_DFL, a lasting change in the target.
func (p *Process) syscall(ctx context.Context, nr uintptr, args []uintptr) (result uintptr, err error) {
	kills, err := wouldKill(p.tid, p.code.call, nr, args)
	if err != nil {
		return 0, fmt.Errorf("look at system call %d first: %w", nr, p.died(err))
	}
	if kills {
		return 0, fmt.Errorf("%w, which would kill the process", ErrSeccomp)
	}
	was, err := p.save()
	if err == nil {
		was.frame, err = p.putFrame(was)
	}
	if err != nil {
		return 0, fmt.Errorf("save the state of thread %d: %w", p.tid, p.died(err))
	}
	p.reached("saved")
	defer func() {
		if restoreErr := p.restore(was); restoreErr != nil {
			err = both(err, restoreErr)
		}
	}()
	if err := p.prepare(was, nr, args); err != nil {
		return 0, fmt.Errorf("set up a system call in thread %d: %w", p.tid, p.died(err))
	}
	entry, err := p.runToSyscallStop(ctx)
	if err != nil {
		return 0, err
	}
	if entry.op != unix.PTRACE_SYSCALL_INFO_ENTRY || entry.word != uint64(nr) {
		return 0, fmt.Errorf("thread %d entered system call %d (stop %d) instead of %d",
			p.tid, entry.word, entry.op, nr)
	}
	p.reached("entered")
	exit, err := p.runToReturn(ctx)
	if err != nil {
		return 0, err
	}
	p.reached("returned")
	if exit.op != unix.PTRACE_SYSCALL_INFO_EXIT {
		return 0, fmt.Errorf("thread %d did not return from system call %d (stop %d)", p.tid, nr, exit.op)
	}
	trapped, err := p.dropSeccompSignal()
	if err != nil {
		return 0, err
	}
	if trapped {
		return 0, ErrSeccomp
	}
	return decodeResult(exit.word)
}

// save reads the thread's state at a stopEvent. It changes nothing.
func (p *Process) save() (was before, err error) {
	if was.regs, err = getRegs(p.tid); err != nil {
		return was, err
	}
	if was.mask, err = getSigmask(p.tid); err != nil {
		return was, err
	}
	was.rseq, err = readRseq(p.tid)
	return was, err
}

// putFrame writes a signal frame below the thread's stack, where the kernel would write it for a signal. The thread can
// restore itself from it by rt_sigreturn(2).
func (p *Process) putFrame(was before) (uint64, error) {
	xstate, err := getXstate(p.tid)
	if err != nil {
		return 0, err
	}
	r := was.regs.withoutCall()
	if err := was.rseq.abort(p.tid, &r); err != nil {
		return 0, err
	}
	sp, image := r.frame(p.code.returns, was.mask, xstate)
	if n, err := unix.PtracePokeData(p.tid, uintptr(sp), image); err != nil {
		return 0, fmt.Errorf("its stack at %#x: %w", sp+uint64(n), err)
	}
	return sp, nil
}

// prepare points the thread at a system call instruction. After the call, the thread would restore itself.
//
// All signals are blocked: those that arrive stay pending until the thread is restored. SIGSTOP and SIGKILL
// cannot be blocked, and need not be. SIGSYS stays unblocked for dropSeccompSignal: see there. The registers are set
// first: if we die after only the signals were blocked, they would stay blocked.
func (p *Process) prepare(was before, nr uintptr, args []uintptr) error {
	p.injecting = true
	ours := was.regs.forCall(p.code.call, was.frame, nr, args)
	if err := setRegs(p.tid, &ours); err != nil {
		return err
	}
	p.reached("set")
	if err := setSigmask(p.tid, ^sigset(0).without(unix.SIGSYS)); err != nil {
		return err
	}
	p.reached("masked")
	return nil
}

// runToSyscallStop lets the thread run to the entry or the exit of our system call.
func (p *Process) runToSyscallStop(ctx context.Context) (syscallInfo, error) {
	signal := uintptr(0)
	for range maxStops {
		if err := ptrace(unix.PTRACE_SYSCALL, p.tid, 0, signal); err != nil {
			return syscallInfo{}, fmt.Errorf("resume thread %d: %w", p.tid, p.died(err))
		}
		s, err := waitStop(ctx, p.tid)
		if err != nil {
			return syscallInfo{}, err
		}
		if s.kind == stopSyscall {
			info, err := getSyscallInfo(p.tid)
			if err != nil {
				return info, fmt.Errorf("system call stop of thread %d: %w", p.tid, p.died(err))
			}
			return info, nil
		}
		// A SIGSTOP is passed on to the process: all its threads stop, and this one comes to a stopEvent that counts
		// as stopped. Resuming it from there leaves the process stopped. On detach the kernel stops this thread,
		// too, unless a SIGCONT came in between. So nothing has to be recorded here.
		signal = p.signalFor(s)
	}
	return syscallInfo{}, fmt.Errorf("thread %d makes no progress: %d stops", p.tid, maxStops)
}

// runToReturn lets the thread run to the exit stop. If the context ends first, the call is interrupted. If the call
// has completed nevertheless, its result is returned: it may be a descriptor that has to be closed.
func (p *Process) runToReturn(ctx context.Context) (syscallInfo, error) {
	exit, err := p.runToSyscallStop(ctx)
	if err == nil || ctx.Err() == nil {
		return exit, err
	}
	grace, cancel := context.WithTimeout(context.Background(), p.restoreLimit)
	defer cancel()
	if interruptErr := p.interrupt(); interruptErr != nil {
		return exit, both(err, interruptErr)
	}
	s, stopErr := waitStop(grace, p.tid)
	if errors.Is(stopErr, ErrProcessGone) {
		return exit, stopErr
	}
	if stopErr != nil || s.kind != stopSyscall {
		return exit, err
	}
	exit, infoErr := getSyscallInfo(p.tid)
	if infoErr != nil {
		return exit, both(err, p.died(infoErr))
	}
	if _, callErr := decodeResult(exit.word); errors.Is(callErr, unix.EINTR) {
		return exit, err
	}
	return exit, nil
}

// dropSeccompSignal runs at the exit stop. A filter that answered SECCOMP_RET_TRAP has queued a SIGSYS whose
// default action kills the process. dropSeccompSignal removes it from the queue: it lets the kernel deliver it to the
// tracer, which drops it. SIGSYS must not be blocked, because the kernel resets the handler of a blocked signal that it
// forces.
func (p *Process) dropSeccompSignal() (trapped bool, err error) {
	trapped, err = p.seccompSignalPending()
	if err != nil || !trapped {
		return false, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.restoreLimit) // it is pending, so this is short
	defer cancel()
	return true, p.runToSeccompSignal(ctx) // restore resumes from there, without the signal
}

func (p *Process) seccompSignalPending() (bool, error) {
	pending, err := pendingSiginfo(p.tid)
	if err != nil {
		return false, fmt.Errorf("pending signals of thread %d: %w", p.tid, p.died(err))
	}
	return slices.ContainsFunc(pending, siginfo.isSeccompTrap), nil
}

// runToSeccompSignal lets the thread run until a SIGSYS of seccomp is delivered. One must be pending. The kernel
// delivers it before the thread reaches user space.
func (p *Process) runToSeccompSignal(ctx context.Context) error {
	for range maxStops {
		s, err := waitStop(ctx, p.tid)
		if err != nil {
			return err
		}
		if s.kind == stopSignal && s.info.isSeccompTrap() {
			return nil
		}
		if err := ptrace(unix.PTRACE_CONT, p.tid, 0, p.signalFor(s)); err != nil {
			return fmt.Errorf("resume thread %d: %w", p.tid, p.died(err))
		}
	}
	return fmt.Errorf("thread %d: SIGSYS of its seccomp filter does not arrive", p.tid)
}

// restore puts back the state that save read. It does not use the caller's context: giving up here would damage the
// process.
//
// Registers are set at a stopEvent, never at the exit stop. At a stopEvent the kernel is at the same point as when they
// were read: in get_signal(), before the code that restarts an interrupted call. That code uses rax =
// -ERESTART… and orig_rax, which restore puts back. nanosleep and poll continue with the time that is left, from
// current->restart_block. It is unchanged, because no call that we inject uses it.
//
// restore never lets the thread run with our registers: while they cannot be replaced, the thread stays stopped.
func (p *Process) restore(was before) error {
	ctx, cancel := context.WithTimeout(context.Background(), p.restoreLimit)
	defer cancel()
	err := p.restoreRepeatedly(ctx, was)
	switch {
	case err == nil:
		return p.sendPostponed()
	case errors.Is(err, ErrProcessGone):
		return err
	}
	go p.restoreLater(was)
	return fmt.Errorf("thread %d: %w: %w; it goes on as soon as that works, or when this program ends",
		p.tid, ErrNotRestored, err)
}

// restoreRepeatedly calls restoreOnce until the thread is restored or gone, or the context ends.
func (p *Process) restoreRepeatedly(ctx context.Context, was before) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := p.restoreOnce(ctx, was)
		if err == nil || errors.Is(err, ErrProcessGone) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

// restoreOnce tries once to restore the thread, and may be repeated. It sets the registers last: until then the thread
// restores itself if we die.
func (p *Process) restoreOnce(ctx context.Context, was before) error {
	if err := p.settle(ctx); err != nil {
		return err
	}
	if err := setSigmask(p.tid, was.mask); err != nil {
		return fmt.Errorf("write the signal mask of thread %d: %w", p.tid, p.died(err))
	}
	p.reached("unmasked")
	if err := was.rseq.restore(p.tid); err != nil {
		return fmt.Errorf("write the restartable sequence of thread %d: %w", p.tid, p.died(err))
	}
	if err := p.setRegs(p.tid, &was.regs); err != nil {
		return fmt.Errorf("write the registers of thread %d: %w", p.tid, p.died(err))
	}
	p.injecting = false
	p.reached("restored")
	return nil
}

// sendPostponed sends SIGSYS again, if somebody else sent one during the injected call: signalFor dropped it.
func (p *Process) sendPostponed() error {
	if !p.postponed {
		return nil
	}
	p.postponed = false
	if err := unix.Kill(p.tid, unix.SIGSYS); err != nil {
		return fmt.Errorf("send SIGSYS to %d again: %w", p.tid, p.died(err))
	}
	return nil
}

// restoreLater tries to restore the thread until it is restored and detached, or gone.
func (p *Process) restoreLater(was before) {
	for {
		err := p.tracer.do(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := p.restoreRepeatedly(ctx, was); err != nil {
				return err
			}
			_ = p.sendPostponed()                          // no caller is left that could get the error
			return ptrace(unix.PTRACE_DETACH, p.tid, 0, 0) // if it fails, the next round repeats it
		})
		switch {
		case err == nil:
			p.tracer.end()
			return
		case errors.Is(err, ErrProcessGone):
			p.tracer.endByExit()
			return
		}
	}
}

// decodeResult applies the kernel's convention that -4095…-1 are errors. A program sees the ERESTART codes (512…516)
// as EINTR.
func decodeResult(word uint64) (uintptr, error) {
	value := int64(word)
	switch {
	case value >= 0 || value < -4095:
		return uintptr(word), nil
	case value <= -512 && value >= -516:
		return 0, unix.EINTR
	}
	return 0, unix.Errno(-value)
}
