// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"os"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// CheckSource looks at a VM as a source does before it calls the destination. machine is for that destination's
// CheckDestination; it is nil where a result says that the VM cannot be moved.
func CheckSource(ctx context.Context, cfg SourceConfig) (results []qemu.Result, machine *migratedv1.SourceMachine) {
	s, ctx := newSource(ctx, cfg)
	defer s.cancel(nil)
	defer s.release()
	var err error
	if s.vm, err = qemu.Attach(ctx, cfg.Spec.GetVm()); err != nil {
		result := resultOf("QMP socket", err)
		result.Remedy = "give the path of a QMP Unix socket of the VM that no other client is connected to"
		return []qemu.Result{result}, nil
	}
	if err := claimed.refuse(s.vm); err != nil {
		return []qemu.Result{resultOf("VM", err)}, nil
	}
	if _, err := s.refuseHandedOver(ctx); err != nil {
		return []qemu.Result{resultOf("VM", err)}, nil
	}
	if results = qemu.CheckVM(ctx, s.vm); refuse("", results) != nil {
		return results, nil
	}
	err = s.openVM(ctx)
	if err == nil {
		machine, err = s.machine()
	}
	if err != nil {
		return append(results, resultOf("VM", err)), nil
	}
	return results, machine
}

// CheckDestination does what Prepare does up to the connection to the source, and ends the QEMU that was started for it.
// One that somebody else started is compared alone. Nothing is left of it.
func CheckDestination(ctx context.Context, cfg DestinationConfig) (results []qemu.Result) {
	d := NewDestination(ctx, cfg)
	defer d.cancel(nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	limit := timeToPrepare(cfg.Request.GetMachine())
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the destination was not ready within %v", limit))
	defer cancel()
	err := os.MkdirAll(cfg.Dir, 0o755)
	defer func() {
		for _, path := range []string{cfg.Dir, d.pipePath(), d.logPath()} {
			if err := os.RemoveAll(path); err != nil {
				d.log.Warn("what a check has left", "error", err)
			}
		}
	}()
	defer d.release()
	switch {
	case err != nil:
	case cfg.Request.GetDestinationQmp() != "":
		if err = d.openQEMU(ctx); err == nil {
			err = d.compare(ctx)
		}
	default:
		err = d.prepareQEMU(ctx)
		d.endQEMU()
	}
	if err != nil {
		return []qemu.Result{resultOf("destination QEMU", causeOf(ctx, err))}
	}
	return []qemu.Result{{Subject: "destination QEMU", Detail: "it would have the same VM as the source"}}
}

// resultOf is an error as a check shows it.
func resultOf(subject string, err error) qemu.Result {
	return qemu.Result{Subject: subject, Status: qemu.Failed, Detail: err.Error(), Remedy: Remedy(err)}
}
