// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"os"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// CheckSource checks a VM as a source does before it calls the destination. machine is the input for CheckDestination
// on the destination; it is nil if a result says that the VM cannot be moved.
func CheckSource(ctx context.Context, cfg SourceConfig) (results []check.Result, machine *migratedv1.SourceMachine) {
	s, ctx := newSource(ctx, cfg)
	defer s.cancel(nil)
	defer s.release()
	var err error
	if s.vm, err = qemu.Attach(ctx, cfg.Spec.GetVm()); err != nil {
		result := resultOf("QMP socket", err)
		result.Remedy = "give the path of a QMP Unix socket of the VM that no other client is connected to"
		return []check.Result{result}, nil
	}
	if err := qemuClaims.checkUnclaimed(s.vm); err != nil {
		return []check.Result{resultOf("VM", err)}, nil
	}
	if _, err := s.refuseHandedOver(ctx); err != nil {
		return []check.Result{resultOf("VM", err)}, nil
	}
	if results = check.VM(ctx, s.vm); refusalOf("", results) != nil {
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

// CheckDestination does what Prepare does before it connects to the source, and then ends the QEMU that it started. A
// QEMU that somebody else started is only compared. CheckDestination removes everything that it made.
func CheckDestination(ctx context.Context, cfg DestinationConfig) (results []check.Result) {
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
				d.log.Warn("cannot remove files of a check", "error", err)
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
		return []check.Result{resultOf("destination QEMU", causeOf(ctx, err))}
	}
	return []check.Result{{Subject: "destination QEMU", Detail: "it would have the same VM as the source"}}
}

// resultOf returns err as the failed result of a check.
func resultOf(subject string, err error) check.Result {
	return check.Result{Subject: subject, Status: check.Failed, Detail: err.Error(), Remedy: Remedy(err)}
}
