// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// committedDomain returns a stage as committed does, whose next daemon takes its VM for a domain of libvirt's that is
// to be undefined. QEMU's own socket stays its monitor. change changes the specification of the migration.
func committedDomain(t *testing.T, change func(*migratedv1.MigrationSpec)) (*stage, *libvirttest.Daemon) {
	t.Helper()
	s := committed(t)
	daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db", Number: 3, Persistent: true, XML: "<domain/>"})
	rec, found, err := s.records.find("m1")
	if err != nil || !found {
		t.Fatalf("the record: %v, %v", found, err)
	}
	spec := &migratedv1.MigrationSpec{}
	if err := protojson.Unmarshal(rec.Spec, spec); err != nil {
		t.Fatal(err)
	}
	spec.Vm, spec.UndefineSource = daemon.Address(), true
	change(spec)
	if rec.Spec, err = protojson.Marshal(spec); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(s.records.path("m1"), rec); err != nil {
		t.Fatal(err)
	}
	s.peer.run = runAtOnce
	return s, daemon
}

// TestDomainStartedAnewStaysDefined: the source's QEMU ended while its memory followed, and its operator started the
// domain anew. When the migration completes, that domain keeps its definition and goes on.
func TestDomainStartedAnewStaysDefined(t *testing.T) {
	s, daemon := committedDomain(t, func(*migratedv1.MigrationSpec) {})
	follows, startedAnew := make(chan struct{}), make(chan struct{})
	s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
		close(follows)
		<-startedAnew
		return stream.Send(&migratedv1.WatchIncomingResponse{
			State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		})
	})
	s.takeUp(t)
	<-follows
	s.endQEMU(t)
	daemon.StartAnew()
	close(startedAnew)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if called := daemon.Called(); len(called) > 0 {
		t.Errorf("libvirt was asked to %v", called)
	}
}
