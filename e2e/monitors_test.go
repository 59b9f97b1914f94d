// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestTwoMonitorsOfOneVM: a VM is its process, whatever monitor a migration was given. One that is being moved is not
// moved a second time, neither is one that is still arriving, nor the QEMU that was left for its memory.
func TestTwoMonitorsOfOneVM(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	other := s.spec()
	other.Vm = lab.EventsPath
	refused := func(from *lab.Host, id string, spec *migratedv1.MigrationSpec, words string) {
		t.Helper()
		m := migrateSpec(t, from, id, spec)
		if m.GetState() != stateFailed || !strings.Contains(m.GetError().GetMessage(), words) {
			t.Fatalf("migration is %v: %v; want %q", m.GetState(), m.GetError(), words)
		}
		t.Log(m.GetError())
	}

	client := s.prepare("first")
	refused(l.A, "second", other, "is being migrated already, by migration first")
	s.cancel(client, "first")
	await(t, client, "first", func(*migratedv1.Migration) bool { return false })

	spec := s.spec()
	spec.KeepSource = true
	if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: "halfway", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	await(t, client, "halfway", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	s.cable(false)
	await(t, control(t, l.B), "halfway", func(m *migratedv1.Migration) bool { return m.GetState() == statePaused })
	refused(l.B, "on", &migratedv1.MigrationSpec{Vm: lab.EventsPath, Destination: l.A.DaemonAddr()},
		"is being migrated already, by migration halfway")
	s.cable(true)
	if m := await(t, client, "halfway", func(*migratedv1.Migration) bool { return false }); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	refused(l.A, "again", other, "was handed over to")
	s.counts()
}
