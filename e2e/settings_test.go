// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// loadsLate says whether a VM's QEMU has the settings that migrated gave it.
func loadsLate(t *testing.T, h *lab.Host) bool {
	t.Helper()
	var capabilities []struct {
		Name string `json:"capability"`
		On   bool   `json:"state"`
	}
	ask(t, h, "query-migrate-capabilities", nil, &capabilities)
	late := false
	for _, c := range capabilities {
		late = late || c.Name == "late-block-activate" && c.On
	}
	var parameters struct {
		AnnounceRounds int `json:"announce-rounds"`
	}
	ask(t, h, "query-migrate-parameters", nil, &parameters)
	if changed := parameters.AnnounceRounds == 1; changed != late {
		t.Fatalf("half of QEMU's settings are put back: late-block-activate %t, %d rounds", late, parameters.AnnounceRounds)
	}
	return late
}

// TestSettingsArePutBackLater: the daemon was killed, and somebody else has QEMU's monitor when it is started again and
// when the last page comes. QEMU gets its settings back when the monitor is free, by this daemon or the next.
func TestSettingsArePutBackLater(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	b := startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.halfway("held")
	mustKill(t, b)
	holder, err := l.B.QMP(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	b = startDaemon(t, l.B)
	s.cable(true)
	m := await(t, control(t, l.A), "held", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	if !loadsLate(t, l.B) {
		t.Fatal("QEMU has its settings back, although its monitor is another's")
	}
	if err := b.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.B)
	if err := holder.Disconnect(); err != nil {
		t.Fatal(err)
	}
	for ctx := testContext(t); loadsLate(t, l.B); time.Sleep(50 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal("QEMU's settings stay changed")
		}
	}
	s.arrived()
	onlyWordKept(t, l.A, l.B)
}
