// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// runState is QEMU's answer to query-status.
type runState struct {
	Status  string `json:"status"` // RunState in qapi/run-state.json: "running", "paused", "inmigrate", ...
	Running bool   `json:"running"`
}

func (vm *VM) runState(ctx context.Context) (runState, error) {
	var s runState
	err := vm.QMP.Do(ctx, "query-status", nil, &s)
	return s, err
}

// Status returns QEMU's run state: "running", "paused", "inmigrate", "postmigrate", ...
func (vm *VM) Status(ctx context.Context) (string, error) {
	s, err := vm.runState(ctx)
	return s.Status, err
}

// Running reports whether the vCPUs run.
func (vm *VM) Running(ctx context.Context) (bool, error) {
	s, err := vm.runState(ctx)
	return s.Running, err
}

// VerifyStopped asks QEMU and returns nil only if no vCPU runs.
func (vm *VM) VerifyStopped(ctx context.Context) error {
	s, err := vm.runState(ctx)
	if err != nil {
		return fmt.Errorf("whether the VM is stopped: %w", err)
	}
	if s.Running {
		return fmt.Errorf("the VM is not stopped, it is %q", s.Status)
	}
	return nil
}

// Stop stops all vCPUs. It returns when they stopped, by QEMU's clock, and whether they ran until then. If the VM was
// stopped before, at is the present time. When Stop returns, disks and network cards have finished their writes to
// memory (do_vm_stop in QEMU's cpus.c).
func (vm *VM) Stop(ctx context.Context) (at time.Time, ran bool, err error) {
	events := vm.QMP.Subscribe("STOP")
	defer events.Close()
	if err := vm.QMP.Do(ctx, "stop", nil, nil); err != nil {
		return time.Time{}, false, err
	}
	if at = lastOf(events, time.Time{}); !at.IsZero() { // the event precedes the reply
		return at, true, nil
	}
	return time.Now(), false, nil
}

// Cont runs the VM, also for the first time at a destination. It returns when the VM began to run, by QEMU's clock. If
// the error is not a *qmp.Error, the VM may or may not run.
func (vm *VM) Cont(ctx context.Context) (time.Time, error) {
	events := vm.QMP.Subscribe("RESUME")
	defer events.Close()
	if err := vm.cont(ctx); err != nil {
		return time.Time{}, err
	}
	if at := lastOf(events, time.Time{}); !at.IsZero() {
		return at, nil
	}
	// The VM ran before, or QEMU only noted the command: while QEMU waits for a migration, cont means "run after the
	// load".
	s, err := vm.runState(ctx)
	if err != nil {
		return time.Time{}, fmt.Errorf("whether the VM runs: %w", err)
	}
	if !s.Running {
		return time.Time{}, fmt.Errorf("QEMU accepted cont, but the VM is %q", s.Status)
	}
	return time.Now(), nil
}

// cont sends the command again while QEMU refuses it because its own migration is still cleaning up ("Migration is not
// finalized yet"). QEMU reports the end of a migration before that clean-up, and no event marks the end of the
// clean-up.
func (vm *VM) cont(ctx context.Context) error {
	const firstPause, longestPause = time.Millisecond, 20 * time.Millisecond
	finalized := false
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		refused := vm.QMP.Do(ctx, "cont", nil, nil)
		if !errors.Is(refused, qmp.ErrGeneric) {
			return refused
		}
		s, err := vm.runState(ctx)
		switch {
		case err == nil && s.Status == "finish-migrate":
		case err == nil && s.Status == "postmigrate" && !finalized:
			finalized = true // perhaps only now: a second refusal is final
		default:
			return refused
		}
		select {
		case <-ctx.Done():
			return refused
		case <-time.After(pause):
		}
	}
}

// lastOf returns the time of the newest event that has arrived, or at if there is none.
func lastOf(events *qmp.Subscription, at time.Time) time.Time {
	for {
		select {
		case e, open := <-events.Events():
			if !open {
				return at
			}
			at = e.Time
		default:
			return at
		}
	}
}
