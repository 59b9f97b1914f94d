// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	stateActive  = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	statePaused  = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED
	stateRecover = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
)

// largeScene is a scene with so much memory, in so many NUMA nodes, that its migrations have a middle.
func largeScene(t *testing.T, l *lab.Lab, nodes int) *scene {
	t.Helper()
	return sceneOf(t, l, lab.VMConfig{MemoryMiB: 1024, Nodes: nodes}.WithDevices(1, 1))
}

// halfway brings a migration to where the VM runs at the destination with a part
// of its memory, and keeps it there: the cable is pulled.
func (s *scene) halfway(id string) *migratedv1.Migration {
	s.Helper()
	client := control(s.T, s.lab.A)
	if _, err := client.Start(testContext(s.T), &migratedv1.StartRequest{Id: id, Spec: s.spec()}); err != nil {
		s.Fatal(err)
	}
	await(s.T, client, id, func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	s.cable(false)
	paused := await(s.T, control(s.T, s.lab.B), id, func(m *migratedv1.Migration) bool { return m.GetState() == statePaused })
	if p := paused.GetProgress(); paused.GetState() != statePaused || p.GetPagesPresent() == p.GetPagesTotal() {
		s.Fatalf("all was over before the cable was pulled: %v", paused)
	}
	return paused
}

func (s *scene) cable(up bool) {
	s.Helper()
	if err := s.lab.SetCable(testContext(s.T), up); err != nil {
		s.Fatal(err)
	}
}

func mustKill(t *testing.T, p *lab.Process) {
	t.Helper()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
}

// TestDaemonsKilledAfterTheSwitch kills daemons in the middle of a migration and starts them again: the VM goes on, its
// memory is whole, and what had arrived is not fetched again.
func TestDaemonsKilledAfterTheSwitch(t *testing.T) {
	for name, c := range map[string]struct {
		source, destination bool
		nodes               int
	}{
		"destination":            {destination: true, nodes: 1},
		"destination, two nodes": {destination: true, nodes: 2},
		"source":                 {source: true, nodes: 1},
		"both":                   {source: true, destination: true, nodes: 1},
	} {
		t.Run(name, func(t *testing.T) {
			l := newHosts(t)
			a, b := startDaemon(t, l.A), startDaemon(t, l.B)
			s := largeScene(t, l, c.nodes)
			had := s.halfway("restart").GetProgress()
			if c.destination {
				mustKill(t, b)
				startDaemon(t, l.B)
				again := await(t, control(t, l.B), "restart", func(m *migratedv1.Migration) bool {
					return m.GetState() == statePaused || m.GetState() == stateRecover
				})
				if p := again.GetProgress(); p.GetPagesPresent() < had.GetPagesPresent() || p.GetDowntime().AsDuration() != had.GetDowntime().AsDuration() {
					t.Errorf("taken up with %v, before that it had %v", p, had)
				}
			}
			if c.source {
				mustKill(t, a)
				startDaemon(t, l.A)
			}
			s.cable(true)
			m := await(t, control(t, l.A), "restart", func(*migratedv1.Migration) bool { return false })
			if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
				t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
			}
			if c.destination {
				checkFetchedOnce(t, had, m.GetProgress())
			}
			s.arrived()
			onlyWordKept(t, l.A, l.B)
		})
	}
}

// checkFetchedOnce compares the figures of a killed daemon with those of the one that took the migration up. A killed
// daemon's last figures are a tenth of a second old, so it may have got more than they say, never less.
func checkFetchedOnce(t *testing.T, before, after *migratedv1.Progress) {
	t.Helper()
	if sum := before.GetBytesOnWire() + after.GetBytesOnWire(); before.GetBytesOnWire() == 0 || sum > after.GetBytesTotal()+64<<20 {
		t.Errorf("%d bytes were fetched before and %d after, of %d", before.GetBytesOnWire(), after.GetBytesOnWire(), after.GetBytesTotal())
	}
}

// nothingKept checks that a migration that is over leaves no files for a daemon that is started again.
func nothingKept(t *testing.T, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		if kept := keptOn(t, h); len(kept) != 0 {
			t.Errorf("host %s keeps %s", h.Name, kept)
		}
	}
}

// onlyWordKept is nothingKept, but for the word of migrations to a host that were completed, which the next daemon can give a
// while longer.
func onlyWordKept(t *testing.T, hosts ...*lab.Host) {
	t.Helper()
	const settled = 64 // in internal/migration's keptHeader
	for _, h := range hosts {
		for _, path := range keptOn(t, h) {
			dir := filepath.Dir(path)
			pages, err := os.ReadFile(h.Path(filepath.Join(dir, "pages")))
			if errors.Is(err, fs.ErrNotExist) && filepath.Base(filepath.Dir(dir)) == "incoming" {
				continue // its time was over just now
			}
			if err != nil || len(pages) < settled+8 || pages[settled] != 1 {
				t.Errorf("host %s keeps %s, which is no word of a completed migration (%v)", h.Name, path, err)
			}
		}
	}
}

// keptOn are the files of migrations for a daemon that is started again.
func keptOn(t *testing.T, h *lab.Host) []string {
	t.Helper()
	out, err := h.Run(testContext(t), "find", "/run/migrated", "-path", "/run/migrated/reports", "-prune", "-o",
		"(", "-name", "*.json", "-o", "-name", "*.commit", "-o", "-name", "pages", ")", "-print")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(out)
}

// TestDestinationDaemonKilledUnderLoad: no cable is pulled; a busy guest in huge and in small pages stalls, goes on when
// the daemon is back, and finds nothing wrong.
func TestDestinationDaemonKilledUnderLoad(t *testing.T) {
	t.Parallel()
	for name, huge := range map[string]bool{"4 KiB": false, "2 MiB": true} {
		t.Run(name, func(t *testing.T) {
			l := newHosts(t)
			startDaemon(t, l.A)
			b := startDaemon(t, l.B)
			c := lab.VMConfig{VCPUs: 2, MemoryMiB: 512, Nodes: 1, HugePages: huge}
			if huge {
				uffdtest.ReserveHugePages(t, 2*c.MemoryMiB/2)
			}
			vm := linux(t, c, "migrated.mem=320", "migrated.ws=128", "migrated.workers=2", "migrated.rate=500", "migrated.write=50",
				"migrated.window=100ms")
			var guest report.Log
			port := bootLinux(t, l.A, vm, &guest)
			awaitWindows(t, &guest, 3)
			if err := port.Close(); err != nil {
				t.Fatal(err)
			}
			client := control(t, l.A)
			spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: l.B.DaemonAddr()}
			if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: "load", Spec: spec}); err != nil {
				t.Fatal(err)
			}
			if m := await(t, client, "load", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive }); m.GetState() != stateActive {
				t.Fatalf("all was over before the daemon could be killed: %v", m)
			}
			mustKill(t, b)
			killed := time.Now()
			startDaemon(t, l.B)
			t.Logf("a new daemon serves %v after the old one was killed", time.Since(killed))
			if m := await(t, client, "load", func(*migratedv1.Migration) bool { return false }); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
				t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
			}
			port = openGuest(t, l.B, &guest)
			defer port.Close()
			awaitWindows(t, &guest, 3)
			verifyLinux(t, &guest, port)
		})
	}
}

// TestDestinationDaemonKilledBeforeTheDeviceState: what it prepared is of no use to anybody. Started again the daemon ends
// the QEMU, and the VM goes on at the source.
func TestDestinationDaemonKilledBeforeTheDeviceState(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	b := startDaemon(t, l.B)
	s := newScene(t, l)
	client := s.prepare("early")
	mustKill(t, b)
	m := await(t, client, "early", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != stateFailed {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	startDaemon(t, l.B)
	s.destinationGone("early")
	if pids, err := l.B.Processes("qemu-system-x86_64"); err != nil || len(pids) != 0 {
		t.Errorf("QEMUs that are left: %v, %v", pids, err)
	}
	nothingKept(t, l.A, l.B)
	s.stillCounting()
}

// TestSourceDaemonKilledBeforeTheSwitch: the VM goes on, and a migration from a daemon that is started again succeeds.
func TestSourceDaemonKilledBeforeTheSwitch(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	a := startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := newScene(t, l)
	s.freezeInDevice("killed")
	mustKill(t, a)
	s.destinationGone("killed")
	startDaemon(t, l.A)
	if kept, err := os.ReadDir(l.A.Path("/run/migrated/handed-over")); err != nil || len(kept) != 0 {
		t.Errorf("records that are left: %v, %v", kept, err)
	}
	s.stillCounting()
	moveMetal(t, s.vm, l.A, l.B)
}

// TestDaemonStoppedAfterTheSwitch is the planned restart, for an upgrade say.
func TestDaemonStoppedAfterTheSwitch(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	b := startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.halfway("upgrade")
	if err := b.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.B)
	s.cable(true)
	if m := await(t, control(t, l.A), "upgrade", func(*migratedv1.Migration) bool { return false }); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	s.arrived()
	onlyWordKept(t, l.A, l.B)
}

// TestRecoverAtAnotherAddress: the network of the migration is gone for good, and the operator names another.
func TestRecoverAtAnotherAddress(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A, "--listen", ":"+lab.DaemonPort)
	startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	const otherA, otherB = "10.79.0.1", "10.79.0.2" // 10.78 is of the VM's cards
	s.ip(l.A, "addr", "add", otherA+"/24", "dev", "cable")
	s.ip(l.B, "addr", "add", otherB+"/24", "dev", "cable")
	client := control(t, l.A)
	if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: "detour", Spec: s.spec()}); err != nil {
		t.Fatal(err)
	}
	await(t, client, "detour", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	s.ip(l.A, "addr", "del", l.A.Addr+"/24", "dev", "cable")
	there := control(t, l.B)
	if m := await(t, there, "detour", func(m *migratedv1.Migration) bool { return m.GetState() == statePaused }); m.GetState() != statePaused {
		t.Fatalf("all was over before the address was gone: %v", m)
	}
	if _, err := there.Recover(testContext(t), &migratedv1.RecoverRequest{Id: "detour", Via: otherA + ":" + lab.DaemonPort}); err != nil {
		t.Fatal(err)
	}
	m := await(t, there, "detour", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	s.ip(l.A, "addr", "add", l.A.Addr+"/24", "dev", "cable") // so that the source hears of it, too
	await(t, client, "detour", func(*migratedv1.Migration) bool { return false })
	s.arrived()
	onlyWordKept(t, l.A, l.B)
}

func (s *scene) ip(h *lab.Host, args ...string) {
	s.Helper()
	if _, err := h.Run(testContext(s.T), append([]string{"ip"}, args...)...); err != nil {
		s.Fatal(err)
	}
}

// TestFallBackWhenTheDestinationIsLost: its QEMU is killed after the switch, and the VM goes on at the source as it was.
func TestFallBackWhenTheDestinationIsLost(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.halfway("lost")
	kill(t, qemuOn(t, l.B), syscall.SIGKILL)
	s.cable(true)
	client := control(t, l.A)
	m := await(t, client, "lost", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != stateFailed || !strings.Contains(m.GetError().GetRemedy(), "migrated fallback lost --destination-is-gone") {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	if _, err := client.FallBack(testContext(t), &migratedv1.FallBackRequest{Id: "lost"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without the confirmation: %v", err)
	}
	if _, err := client.FallBack(testContext(t), &migratedv1.FallBackRequest{Id: "lost", DestinationIsGone: true}); err != nil {
		t.Fatal(err)
	}
	s.countsAtTheSource() // it has run at the destination, perhaps to the end of a pass
	nothingKept(t, l.A)
}
