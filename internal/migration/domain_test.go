// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"slices"
	"strings"
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

// completedWith returns a destination's last message of a migration that completed. defined is what it says of the
// domain's definition; nil: nothing.
func completedWith(defined *bool) *migratedv1.WatchIncomingResponse {
	return &migratedv1.WatchIncomingResponse{
		State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, Defined: defined,
	}
}

// TestDefinitionOfTheSource: the source's definition goes only when the migration completed and, where the domain was
// to be defined at the destination, the destination has said that it is. Else it stays, and the migration says what to
// do.
func TestDefinitionOfTheSource(t *testing.T) {
	yes, no := true, false
	for name, c := range map[string]struct {
		persistent bool // asked for
		transient  bool // at the source
		answer     *migratedv1.WatchIncomingResponse
		want       string // why it stays; empty: it goes
	}{
		"defined there":           {true, false, completedWith(&yes), ""},
		"not to be defined there": {false, false, completedWith(nil), ""},
		"could not be defined":    {true, false, completedWith(&no), "could not"},
		"an older destination":    {true, false, completedWith(nil), "of earlier versions"},
		"a transient domain":      {true, true, completedWith(nil), ""},
		"the VM ended": {false, false, &migratedv1.WatchIncomingResponse{
			State: migratedv1.MigrationState_MIGRATION_STATE_FAILED, Location: migratedv1.Location_LOCATION_ENDED,
			Error:   &migratedv1.MigrationError{Message: "off", Reason: migratedv1.Reason_REASON_GUEST_SHUTDOWN},
			Defined: &yes,
		}, "the VM ended"},
	} {
		t.Run(name, func(t *testing.T) {
			s, daemon := committedDomain(t, func(spec *migratedv1.MigrationSpec) { spec.Persistent = c.persistent })
			daemon.Change(func(d *libvirttest.Domain) { d.Persistent = !c.transient })
			s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
				return stream.Send(c.answer)
			})
			s.takeUp(t)
			<-s.source.Done()
			if err := s.qemu.Wait(); err != nil {
				t.Errorf("the source's QEMU: %v", err)
			}
			checkDefinition(t, s, daemon, c.want)
			undefined := slices.Equal(daemon.Called(), []string{"undefine"})
			if undefined != (c.want == "" && !c.transient) {
				t.Errorf("libvirt was asked to %v", daemon.Called())
			}
		})
	}
}

// checkDefinition checks what the source says of its definition. want is why it stays; empty: it does not.
func checkDefinition(t *testing.T, s *stage, daemon *libvirttest.Daemon, want string) {
	t.Helper()
	view, _ := s.source.Snapshot()
	said := view.GetDefinition()
	if want == "" && said != "" || !strings.Contains(said, want) ||
		want != "" && !strings.Contains(said, "run here: virsh undefine db") {
		t.Errorf("the source says %q, want %q and the remedy", said, want)
	}
	if defined := daemon.Domain().Persistent; defined != (want != "") {
		t.Errorf("the domain is defined: %v", defined)
	}
}

// TestDefinitionAfterARestart: a restarted daemon that has to end the source's QEMU still knows what the destination
// said of the domain's definition.
func TestDefinitionAfterARestart(t *testing.T) {
	yes := true
	for name, c := range map[string]struct {
		said  *bool
		ended migratedv1.Reason
		want  string
	}{
		"defined there": {&yes, migratedv1.Reason_REASON_UNSPECIFIED, ""},
		"nothing said":  {nil, migratedv1.Reason_REASON_UNSPECIFIED, "has not said"},
		"the VM ended":  {&yes, migratedv1.Reason_REASON_GUEST_SHUTDOWN, "the VM ended"},
	} {
		t.Run(name, func(t *testing.T) {
			s, daemon := committedDomain(t, func(spec *migratedv1.MigrationSpec) { spec.Persistent = true })
			told := make(chan struct{})
			s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
				err := stream.Send(&migratedv1.WatchIncomingResponse{
					State: migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE, Defined: c.said,
					Location: migratedv1.Location_LOCATION_DESTINATION, Qemu: &migratedv1.QemuProcess{Pid: 4711},
				})
				if err == nil {
					close(told)
					<-stream.Context().Done()
				}
				return err
			})
			ctx, stop := context.WithCancelCause(t.Context())
			s.takeUpIn(t, ctx)
			<-told
			for view, changed := s.source.Snapshot(); view.GetDestinationQemu().GetPid() != 4711; {
				<-changed
				view, changed = s.source.Snapshot()
			}
			stop(errors.New("the daemon ends"))
			<-s.source.Done()
			if err := s.records.Complete("m1", c.ended, nil); err != nil {
				t.Fatal(err)
			}
			s.takeUp(t)
			<-s.source.Done()
			checkDefinition(t, s, daemon, c.want)
		})
	}
}

// TestDefinitionAfterARelease: the domain of a migration that an operator ended stays defined, and the migration says
// so, also if the domain's QEMU has ended.
func TestDefinitionAfterARelease(t *testing.T) {
	s, daemon := committedDomain(t, func(*migratedv1.MigrationSpec) {})
	s.peer.setWatch(unreachable)
	s.takeUp(t)
	s.endQEMU(t)
	if err := s.source.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "an operator declared")
	checkDefinition(t, s, daemon, "cannot say that the domain is defined there")
	if called := daemon.Called(); len(called) > 0 {
		t.Errorf("libvirt was asked to %v", called)
	}
	s.noRecord(t)
}
