// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// If the connection to QEMU is lost while the VM stands still, as libvirt's connections are with its daemon, the source
// continues the VM over a new one.
func TestSourceContinuesOverAnotherMonitor(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.load = func(context.Context) error {
		if err := s.source.vm.QMP.Disconnect(); err != nil {
			t.Error(err)
		}
		return status.Error(codes.Internal, "the destination QEMU did not load it")
	}
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	if !s.vmRuns(t) {
		t.Error("the VM does not run")
	}
	s.noRecord(t)
}
