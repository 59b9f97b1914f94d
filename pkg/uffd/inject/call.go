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

// before is what an injected call changes in the thread and what has to be put back.
type before struct {
	regs regs
	mask sigset
	rseq rseqState
}

// Syscall makes the thread execute one system call and returns its result. An error the kernel returned to the
// thread is a unix.Errno; ErrSeccomp and ErrProcessGone are what a seccomp filter may make of it. Pointer
// arguments are addresses in the other process.
//
// When ctx ends, after 5 seconds at the latest, a call that still blocks is interrupted and the error is the
// context's. Whatever happens, the thread is back in its former state when Syscall returns, except for
// ErrNotRestored, which says that the call hangs and what becomes of it.
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
// PTRACE_SYSCALL and not PTRACE_SINGLESTEP, because (1) at the entry stop it is certain which call is going to
// run, (2) a single step ends with a SIGTRAP that the kernel forces, and forcing a blocked signal resets its
// handler to SIG_DFL: a lasting change in the target.
func (p *Process) syscall(ctx context.Context, nr uintptr, args []uintptr) (result uintptr, err error) {
	kills, err := wouldKill(p.tid, p.insn, nr, args)
	if err != nil {
		return 0, fmt.Errorf("look at system call %d first: %w", nr, p.died(err))
	}
	if kills {
		return 0, fmt.Errorf("%w, which would kill the process", ErrSeccomp)
	}
	was, err := p.save()
	if err != nil {
		return 0, fmt.Errorf("save the state of thread %d: %w", p.tid, p.died(err))
	}
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
	exit, err := p.runToReturn(ctx)
	if err != nil {
		return 0, err
	}
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

// save runs at a stopEvent and changes nothing.
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

// prepare points the thread at a system call instruction. From here to the end of restore the process dies if
// we do.
//
// All signals are blocked: those that arrive stay pending and find the thread as they expect it, after the
// call. SIGSTOP and SIGKILL cannot be blocked, and need not be. SIGSYS is left open for dropSeccompSignal: see
// there.
func (p *Process) prepare(was before, nr uintptr, args []uintptr) error {
	p.injecting = true
	if err := p.setOptions(unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_EXITKILL); err != nil {
		return err
	}
	if err := setSigmask(p.tid, ^sigset(0).without(unix.SIGSYS)); err != nil {
		return err
	}
	ours := was.regs.forCall(p.insn, nr, args)
	return setRegs(p.tid, &ours)
}

func (p *Process) setOptions(options uintptr) error {
	return ptrace(unix.PTRACE_SETOPTIONS, p.tid, 0, options)
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
		// A SIGSTOP goes on to the process: all its threads stop, this one comes to a stopEvent that counts as
		// stopped. Resuming it from there leaves the process stopped; on detaching the kernel stops this thread
		// too, unless a SIGCONT came in between. Nothing of that has to be kept here.
		signal = p.signalFor(s)
	}
	return syscallInfo{}, fmt.Errorf("thread %d makes no progress: %d stops", p.tid, maxStops)
}

// runToReturn lets the thread run to the exit stop. When the context ends first the call is interrupted; but if
// it has done its work nevertheless, then its result counts: it may be a descriptor that somebody has to close.
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
// default action kills the process; it is taken off the queue by letting it be delivered to the tracer alone.
// It must not be blocked, because the kernel resets the handler of a signal it has to force through.
func (p *Process) dropSeccompSignal() (trapped bool, err error) {
	trapped, err = p.seccompSignalPending()
	if err != nil || !trapped {
		return false, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.restoreLimit) // it is pending: a moment is enough
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

// runToSeccompSignal wants such a signal to be pending. The kernel delivers it before the thread can reach user
// space.
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

// restore puts back what save saw. It does not use the caller's context: giving up here would damage the
// process.
//
// Registers are set at a stopEvent, never at the exit stop. There the kernel is at the same point as when they
// were read: in get_signal(), before the code that restarts an interrupted call, which works from rax =
// -ERESTART… and orig_rax, the very registers put back. current->restart_block, from which nanosleep and poll
// continue with the time that is left, was not touched, since none of the calls we inject is such a call
// itself.
func (p *Process) restore(was before) error {
	ctx, cancel := context.WithTimeout(context.Background(), p.restoreLimit)
	defer cancel()
	err := p.restoreOnce(ctx, was)
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	go p.restoreLater(was)
	return fmt.Errorf("thread %d: %w: %w", p.tid, ErrNotRestored, err)
}

func (p *Process) restoreOnce(ctx context.Context, was before) error {
	if err := p.settle(ctx); err != nil {
		return err
	}
	err := errors.Join(
		setRegs(p.tid, &was.regs),
		was.rseq.restore(p.tid),
		setSigmask(p.tid, was.mask),
		p.setOptions(unix.PTRACE_O_TRACESYSGOOD),
	)
	if err != nil {
		return fmt.Errorf("restore thread %d: %w", p.tid, p.died(err))
	}
	p.injecting = false
	if p.postponed {
		p.postponed = false
		if err := unix.Kill(p.tid, unix.SIGSYS); err != nil {
			return fmt.Errorf("send SIGSYS to %d again: %w", p.tid, p.died(err))
		}
	}
	return nil
}

// restoreLater ends when the call has returned or the process has died.
func (p *Process) restoreLater(was before) {
	for {
		err := p.tracer.do(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := p.restoreOnce(ctx, was); err != nil {
				return err
			}
			return ptrace(unix.PTRACE_DETACH, p.tid, 0, 0)
		})
		switch {
		case err == nil:
			p.tracer.end()
			return
		case !errors.Is(err, context.DeadlineExceeded): // dead, or beyond repair: PTRACE_O_EXITKILL
			p.tracer.endByExit()
			return
		}
	}
}

// decodeResult applies the kernel's convention that -4095…-1 are errors. The ERESTART codes (512…516) say EINTR
// to a program.
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
