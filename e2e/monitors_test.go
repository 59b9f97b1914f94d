// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestTwoMonitorsOfOneVM: a VM is identified by its process, whichever of its monitors a migration uses. The daemon
// refuses a second migration of a VM that is being moved, of one that is still arriving, and of a QEMU that KeepSource
// left at the source.
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
	cancel(t, client, "first")
	awaitEnd(t, client, "first")

	spec := s.spec()
	spec.KeepSource = true
	s.moveHalfwayWith("halfway", spec)
	refused(l.B, "on", &migratedv1.MigrationSpec{Vm: lab.EventsPath, Destination: l.A.DaemonAddr()},
		"is being migrated already, by migration halfway")
	s.cable(true)
	completed(t, awaitEnd(t, client, "halfway"))
	refused(l.A, "again", other, "was handed over to")
	s.countsAtDestination()
}
