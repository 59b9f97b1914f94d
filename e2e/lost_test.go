// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestPlannedRestartOfTheSource restarts the source's daemon after the switch. A command that follows the migration
// does not report a failure.
func TestPlannedRestartOfTheSource(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	a := startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	command := l.A.Command(testContext(t), binary, "migrate", "--id", "planned", "--vm", lab.QMPPath,
		"--to", l.B.DaemonAddr(), "--bandwidth", "4M")
	var out strings.Builder
	command.Stdout, command.Stderr = &out, &out
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	there := control(t, l.B)
	eventually(t, func() error { // the destination does not know the migration at first
		answer, err := there.Get(testContext(t), &migratedv1.GetRequest{Id: "planned"})
		if err == nil && answer.GetMigration().GetState() != stateActive {
			err = fmt.Errorf("the VM does not run there: %v", answer)
		}
		return err
	})
	if err := a.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	inFlight(t, "planned", l.B)
	unlimit(t, there, "planned")
	startDaemon(t, l.A)
	if err := command.Wait(); err != nil || strings.Contains(strings.ToLower(out.String()), "failed") {
		t.Errorf("migrate ends with %v:\n%s", err, out.String())
	}
	t.Log(out.String())
	s.arrived()
	nothingKept(t, l.A)
}

// TestSourceHostLost removes the source's daemon, its QEMU and its records after the switch. The destination reports
// that the source refuses to send pages, and names a command that ends the migration and the VM there.
func TestSourceHostLost(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	a := startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.moveHalfway("lost")
	mustKill(t, a)
	kill(t, qemuOn(t, l.A), syscall.SIGKILL)
	for _, dir := range []string{"/run/migrated/handed-over", "/run/migrated/incoming"} {
		if err := os.RemoveAll(l.A.Path(dir)); err != nil {
			t.Fatal(err)
		}
	}
	startDaemon(t, l.A)
	s.cable(true)
	const want = "migrated abandon lost --source-is-gone"
	m := await(t, control(t, l.B), "lost", func(m *migratedv1.Migration) bool {
		return m.GetError().GetReason() == migratedv1.Reason_REASON_PAGES_REFUSED
	})
	says := m.GetError()
	if m.GetState() != statePaused || m.GetLocation() != migratedv1.Location_LOCATION_DESTINATION ||
		!strings.Contains(says.GetRemedy(), want) || strings.Contains(says.GetRemedy(), "reachable") {
		t.Errorf("it is %v, the VM %v: %v", m.GetState(), m.GetLocation(), says)
	}
	if out, code := operate(t, l.B, "abandon", "lost"); code != 2 || qemuOn(t, l.B) == 0 {
		t.Errorf("without the confirmation: exit code %d: %s", code, out)
	}
	if out, code := operate(t, l.B, strings.Fields(want)[1:]...); code != 0 ||
		!strings.Contains(out, "was ended on the destination") {
		t.Errorf("exit code %d: %s", code, out)
	}
	awaitNoQEMU(t, l.B)
	m = get(t, l.B, "lost")
	if m.GetState() != stateFailed || m.GetLocation() != migratedv1.Location_LOCATION_ENDED ||
		m.GetError().GetReason() != migratedv1.Reason_REASON_ABANDONED {
		t.Errorf("it is %v, the VM %v: %v", m.GetState(), m.GetLocation(), m.GetError())
	}
	nothingKept(t, l.A, l.B)
}

// TestWhatIsNotLost checks that a migration whose hosts both work can be neither abandoned nor released.
func TestWhatIsNotLost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	client := s.moveSlowly("well")
	if out, code := operate(t, l.B, "abandon", "well", "--source-is-gone"); code == 0 ||
		!strings.Contains(out, "is not lost") {
		t.Errorf("abandon: exit code %d: %s", code, out)
	}
	if out, code := operate(t, l.A, "release", "well", "--vm-is-at-destination"); code == 0 ||
		!strings.Contains(out, "needs memory") {
		t.Errorf("release: exit code %d: %s", code, out)
	}
	unlimit(t, client, "well")
	completed(t, awaitEnd(t, client, "well"))
	s.arrived()
}
