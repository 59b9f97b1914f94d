// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
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

func mustKill(t *testing.T, p *lab.Process) {
	t.Helper()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
}

// TestDaemonsKilledAfterTheSwitch kills daemons in the middle of a migration and starts them again. The VM continues,
// its memory is whole, and pages that had arrived are not fetched again.
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
			had := s.moveHalfway("restart").GetProgress()
			var taken *migratedv1.Progress // when the destination's second daemon began
			if c.destination {
				mustKill(t, b)
				startDaemon(t, l.B)
				again := await(t, control(t, l.B), "restart", func(m *migratedv1.Migration) bool {
					return m.GetState() == statePaused || m.GetState() == stateRecover
				})
				if taken = again.GetProgress(); taken.GetPagesPresent() < had.GetPagesPresent() ||
					taken.GetDowntime().AsDuration() != had.GetDowntime().AsDuration() {
					t.Errorf("taken up with %v, before that it had %v", taken, had)
				}
			}
			if c.source {
				mustKill(t, a)
				startDaemon(t, l.A)
			}
			s.cable(true)
			completed(t, awaitEnd(t, control(t, l.A), "restart"))
			if c.destination {
				checkFetchedOnce(t, taken, reportOf(t, l.B, "restart").GetIncoming())
			}
			s.arrived()
			onlyWordKept(t, l.A, l.B)
		})
	}
}

// checkFetchedOnce checks that a daemon that took a migration up fetched only pages that were missing then. taken is
// the progress at that time, and in is what the daemon counted until the end. A page that the sweep had requested comes
// twice if a fault requests it, too. Half of the pages that were present are the margin for a lost connection: pages
// that came over it, but were not installed, are fetched again.
func checkFetchedOnce(t *testing.T, taken *migratedv1.Progress, in *migratedv1.IncomingPages) {
	t.Helper()
	present := taken.GetPagesPresent()
	most := taken.GetPagesTotal() - present + in.GetCauses().GetSwept() + present/2
	if fetched := in.GetDemandPages() + in.GetSweepPages(); !in.GetTakenUp() || present == 0 || fetched == 0 ||
		fetched > most {
		t.Errorf("%d pages of %d were present, and %d were fetched, want at most %d: %v",
			present, taken.GetPagesTotal(), fetched, most, in)
	}
}

// nothingKept waits until the hosts keep no files for a restarted daemon. A daemon removes those of a migration once it
// shows that the migration is over.
func nothingKept(t *testing.T, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		eventually(t, func() error {
			if kept := keptOn(t, h); len(kept) != 0 {
				return fmt.Errorf("host %s keeps %s", h.Name, kept)
			}
			return nil
		})
	}
}

// onlyWordKept is nothingKept with one exception: a destination may keep its word, the outcome of a completed
// migration, so that a restarted daemon can still tell the source for a while.
func onlyWordKept(t *testing.T, hosts ...*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		eventually(t, func() error {
			var errs []error
			for _, path := range keptOn(t, h) {
				errs = append(errs, isWord(h, path))
			}
			return errors.Join(errs...)
		})
	}
}

// isWord returns nil if a file that a host keeps is of a word: the outcome of a completed migration. The file may have
// been removed since it was listed.
func isWord(h *lab.Host, path string) error {
	const filled, closed, ended, end = 48, 64, 72, 80 // offsets in internal/migration's keptHeader
	if _, err := os.Lstat(h.Path(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	pages, err := os.ReadFile(h.Path(filepath.Join(filepath.Dir(path), "pages")))
	if err != nil || len(pages) < end || pages[filled] != 1 || pages[closed] != 1 || pages[ended] != 0 {
		return fmt.Errorf("host %s keeps %s, which is no word of a completed migration (%v)", h.Name, path, err)
	}
	return nil
}

// keptOn returns the files of migrations that a host keeps for a restarted daemon.
func keptOn(t *testing.T, h *lab.Host) []string {
	t.Helper()
	out, err := h.Run(testContext(t), "find", "/run/migrated", "-path", "/run/migrated/reports", "-prune", "-o",
		"(", "-name", "*.json", "-o", "-name", "*.commit", "-o", "-name", "pages", ")", "-print")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(out)
}

// TestDestinationDaemonKilledUnderLoad kills the destination's daemon while a busy guest runs there, with huge and with
// small pages. The network stays up. The guest stalls, continues when the daemon is back, and finds no damage.
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
			vm := linux(t, c, "migrated.mem=320", "migrated.ws=128", "migrated.workers=2", "migrated.rate=500",
				"migrated.write=50", "migrated.window=100ms")
			var guest report.Log
			port := bootLinux(t, l.A, vm, &guest)
			awaitWindows(t, &guest, 3)
			if err := port.Close(); err != nil {
				t.Fatal(err)
			}
			client := control(t, l.A)
			// The limit keeps the memory that the guest does not use at the source.
			spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: l.B.DaemonAddr(), Bandwidth: 1 << 20}
			start(t, client, "load", spec)
			awaitState(t, client, "load", stateActive)
			mustKill(t, b)
			killed := time.Now()
			startDaemon(t, l.B)
			t.Logf("a new daemon serves %v after the old one was killed", time.Since(killed))
			inFlight(t, "load", l.B)
			unlimit(t, control(t, l.B), "load")
			completed(t, awaitEnd(t, client, "load"))
			port = openGuest(t, l.B, &guest)
			defer port.Close()
			awaitWindows(t, &guest, 3)
			verifyLinux(t, &guest, port)
		})
	}
}

// TestDestinationDaemonKilledBeforeTheDeviceState kills the destination's daemon after the preparation, and the
// migration fails. The restarted daemon ends the prepared QEMU, and the VM continues at the source.
func TestDestinationDaemonKilledBeforeTheDeviceState(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	b := startDaemon(t, l.B)
	s := newScene(t, l)
	client := s.prepare("early")
	mustKill(t, b)
	m := awaitEnd(t, client, "early")
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

// TestSourceDaemonKilledBeforeTheSwitch checks that the VM continues to run, and that it can be migrated after the
// daemon was started again.
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

// TestDaemonStoppedAfterTheSwitch restarts the destination's daemon in the middle of a migration, as an upgrade does.
// The migration completes.
func TestDaemonStoppedAfterTheSwitch(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	b := startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.moveHalfway("upgrade")
	if err := b.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.B)
	s.cable(true)
	completed(t, awaitEnd(t, control(t, l.A), "upgrade"))
	s.arrived()
	onlyWordKept(t, l.A, l.B)
}

// TestRecoverAtAnotherAddress removes the source's address permanently in the middle of a migration. The operator
// recovers the migration with another address.
func TestRecoverAtAnotherAddress(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A, "--listen", ":"+lab.DaemonPort)
	startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	const otherA, otherB = "10.79.0.1", "10.79.0.2" // 10.78 is the network of the VM's cards
	s.ip(l.A, "addr", "add", otherA+"/24", "dev", "cable")
	s.ip(l.B, "addr", "add", otherB+"/24", "dev", "cable")
	client := control(t, l.A)
	s.moveSlowly("detour")
	s.ip(l.A, "addr", "del", l.A.Addr+"/24", "dev", "cable")
	there := control(t, l.B)
	awaitState(t, there, "detour", statePaused)
	unlimit(t, there, "detour")
	if _, err := there.Recover(
		testContext(t), &migratedv1.RecoverRequest{Id: "detour", Via: otherA + ":" + lab.DaemonPort},
	); err != nil {
		t.Fatal(err)
	}
	completed(t, awaitEnd(t, there, "detour"))
	s.ip(l.A, "addr", "add", l.A.Addr+"/24", "dev", "cable") // so that the source learns of the end, too
	awaitEnd(t, client, "detour")
	s.arrived()
	onlyWordKept(t, l.A, l.B)
}

func (s *scene) ip(h *lab.Host, args ...string) {
	s.Helper()
	if _, err := h.Run(testContext(s.T), append([]string{"ip"}, args...)...); err != nil {
		s.Fatal(err)
	}
}

// TestFallBackWhenTheDestinationIsLost kills the destination's QEMU after the switch. The VM continues at the source,
// in its state at the switch.
func TestFallBackWhenTheDestinationIsLost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	s.moveHalfway("lost")
	kill(t, qemuOn(t, l.B), syscall.SIGKILL)
	s.cable(true)
	client := control(t, l.A)
	m := awaitEnd(t, client, "lost")
	if m.GetState() != stateFailed ||
		!strings.Contains(m.GetError().GetRemedy(), "migrated fallback lost --destination-is-gone") {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	if _, err := client.FallBack(
		testContext(t), &migratedv1.FallBackRequest{Id: "lost"},
	); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without the confirmation: %v", err)
	}
	fallBack(t, client, "lost")
	s.countsAtSourceAlone() // not stillCounting: the guest may have ended a pass at the destination
	nothingKept(t, l.A)
}
