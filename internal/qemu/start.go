// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu/launch"
)

// Start starts QEMU and returns when its QMP socket answers. QEMU is a child of s or, when s is nil, of this process.
// When Start fails, no QEMU is left.
func Start(ctx context.Context, s *launch.Starter, opts launch.Options) (*launch.Process, *VM, error) {
	p, err := s.Launch(opts)
	if err != nil {
		return nil, nil, err
	}
	vm, err := awaitQMP(ctx, p, opts.QMPPath)
	if err != nil {
		// ctx may have ended already, so it cannot bound the kill. SIGKILL needs little time.
		killCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), quitPatience)
		defer cancel()
		return nil, nil, errors.Join(err, p.Kill(killCtx))
	}
	return p, vm, nil
}

// awaitQMP tries to attach until it succeeds, QEMU ends or ctx ends.
func awaitQMP(ctx context.Context, p *launch.Process, path string) (*VM, error) {
	const firstPause, longestPause = time.Millisecond, 20 * time.Millisecond
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		vm, err := Attach(ctx, path)
		if err == nil && vm.Pid == p.Pid() {
			return vm, nil
		}
		if err == nil {
			err = fmt.Errorf("process %d listens at %s instead of process %d, which was started", vm.Pid, path, p.Pid())
			return nil, errors.Join(err, vm.Close())
		}
		select {
		case <-p.Exited():
			return nil, fmt.Errorf("QEMU ended before its QMP socket %s answered: %s", path, p.ExitReason())
		case <-ctx.Done():
			said := p.LastLines()
			if said != "" {
				said = "; QEMU says: " + said
			}
			return nil, fmt.Errorf("QEMU's QMP socket %s does not answer: %w (last attempt: %w)%s",
				path, context.Cause(ctx), err, said)
		case <-time.After(pause):
		}
	}
}
