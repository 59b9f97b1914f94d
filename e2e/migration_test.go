// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	stateDevice    = migratedv1.MigrationState_MIGRATION_STATE_DEVICE
	stateActive    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	statePaused    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED
	stateRecover   = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
	stateCompleted = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
	stateRehearsed = migratedv1.MigrationState_MIGRATION_STATE_REHEARSED
	stateFailed    = migratedv1.MigrationState_MIGRATION_STATE_FAILED
	stateCancelled = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	stateEnded     = migratedv1.MigrationState_MIGRATION_STATE_ENDED
)

// migrate moves the VM and returns the migration as its source shows it.
func migrate(t *testing.T, from, to *lab.Host, id string) *migratedv1.Migration {
	t.Helper()
	spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: to.DaemonAddr()}
	return completed(t, migrateSpec(t, from, id, spec))
}

// migrateSpec starts a migration and follows it to its end.
func migrateSpec(t *testing.T, from *lab.Host, id string, spec *migratedv1.MigrationSpec) *migratedv1.Migration {
	t.Helper()
	client := control(t, from)
	start(t, client, id, spec)
	return awaitEnd(t, client, id)
}

// start starts a migration. spec is nil if the migration was prepared.
func start(t *testing.T, client migratedv1.ControlServiceClient, id string, spec *migratedv1.MigrationSpec) {
	t.Helper()
	if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
		t.Fatal(err)
	}
}

// prepare prepares a migration and waits until that is done.
func prepare(
	t *testing.T, client migratedv1.ControlServiceClient, id string, spec *migratedv1.MigrationSpec,
) *migratedv1.Migration {
	t.Helper()
	if _, err := client.Prepare(testContext(t), &migratedv1.PrepareRequest{Id: id, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	m := await(t, client, id, (*migratedv1.Migration).GetPrepared)
	if !m.GetPrepared() {
		t.Fatalf("migration is not prepared, it is %v: %v", m.GetState(), m.GetError())
	}
	return m
}

// cancel cancels a migration.
func cancel(t *testing.T, client migratedv1.ControlServiceClient, id string) {
	t.Helper()
	if _, err := client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
}

// unlimit removes a migration's bandwidth limit. client may be of either host.
func unlimit(t *testing.T, client migratedv1.ControlServiceClient, id string) {
	t.Helper()
	if _, err := client.SetBandwidth(testContext(t), &migratedv1.SetBandwidthRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
}

// fallBack continues the VM at the source, with the confirmation that the destination is gone.
func fallBack(t *testing.T, client migratedv1.ControlServiceClient, id string) {
	t.Helper()
	if _, err := client.FallBack(
		testContext(t), &migratedv1.FallBackRequest{Id: id, DestinationIsGone: true},
	); err != nil {
		t.Fatal(err)
	}
}

// get returns a migration as a host shows it now.
func get(t *testing.T, h *lab.Host, id string) *migratedv1.Migration {
	t.Helper()
	answer, err := control(t, h).Get(testContext(t), &migratedv1.GetRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetMigration()
}

// completed fails the test unless the migration is completed, and returns it.
func completed(t *testing.T, m *migratedv1.Migration) *migratedv1.Migration {
	t.Helper()
	if m.GetState() != stateCompleted {
		t.Fatalf("migration %s is %v: %v", m.GetId(), m.GetState(), m.GetError())
	}
	return m
}

// inFlight checks that pages are still missing at the destination: what the test did before this call, it did in the
// middle of the migration.
func inFlight(t *testing.T, id string, to *lab.Host) {
	t.Helper()
	m := get(t, to, id)
	if p := m.GetProgress(); p.GetPagesPresent() == p.GetPagesTotal() {
		t.Errorf("migration %s was over before it was disturbed: %v", id, m)
	}
}

// awaitEnd waits until a migration is over.
func awaitEnd(t *testing.T, client migratedv1.ControlServiceClient, id string) *migratedv1.Migration {
	t.Helper()
	return await(t, client, id, func(*migratedv1.Migration) bool { return false })
}

// awaitState waits until a migration is in that state. The test fails if the migration ends before.
func awaitState(
	t *testing.T, client migratedv1.ControlServiceClient, id string, state migratedv1.MigrationState,
) *migratedv1.Migration {
	t.Helper()
	m := await(t, client, id, func(m *migratedv1.Migration) bool { return m.GetState() == state })
	if m.GetState() != state {
		t.Fatalf("migration %s was over before it was %v: %v", id, state, m)
	}
	return m
}

// await watches a migration until wanted accepts it or it is over. The test fails if a page was present before it
// arrived: no process but QEMU touches the VM's memory. A test in which another process does uses follow.
func await(
	t *testing.T, client migratedv1.ControlServiceClient, id string, wanted func(*migratedv1.Migration) bool,
) *migratedv1.Migration {
	t.Helper()
	m := follow(t, client, id, wanted)
	if p := m.GetProgress(); p.GetPagesTouched() != 0 || p.GetPagesUnexplained() != 0 {
		t.Errorf("%d pages were there before they came, and %d more could not be written again",
			p.GetPagesTouched(), p.GetPagesUnexplained())
	}
	return m
}

// follow is await for tests in which other processes may touch the VM's memory.
func follow(
	t *testing.T, client migratedv1.ControlServiceClient, id string, wanted func(*migratedv1.Migration) bool,
) *migratedv1.Migration {
	t.Helper()
	stream, err := client.Watch(testContext(t), &migratedv1.WatchRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	var last *migratedv1.Migration
	for {
		answer, err := stream.Recv()
		if err != nil {
			if migration.Terminal(last.GetState()) {
				return last
			}
			t.Fatalf("watch ended in state %v: %v", last.GetState(), err)
		}
		if last = answer.GetMigration(); wanted(last) {
			return last
		}
	}
}
