// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestGuestGivesMemoryBack: while its memory comes, a guest frees pages and reports them, a balloon takes more, and both are
// used again. Nothing that the guest uses is lost, or is what it was before.
func TestGuestGivesMemoryBack(t *testing.T) {
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	vm := lab.VMConfig{
		VCPUs: 2, MemoryMiB: 512, Nodes: 1, Kernel: kernel, Initrd: initrd,
		KernelArgs: []string{"migrated.mem=96", "migrated.workers=1", "migrated.rate=500", "migrated.churn=64"},
		Extra:      []string{"-device", "virtio-balloon-pci,free-page-reporting=on"},
	}
	startVM(t, l.A, vm, lab.EventsArgs()...)
	var guest report.Log
	port := openGuest(t, l.A, &guest)
	churned(t, &guest, 1)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	// So slow that the guest has time for some rounds meanwhile.
	if out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "m", "--bandwidth", "3M", "--detach"); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	await(t, control(t, l.A), "m", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	port = openGuest(t, l.B, &guest)
	began := churned(t, &guest, 0)
	client, err := qmp.Dial(testContext(t), l.B.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	for i, mib := range []int{352, 512, 352, 512} {
		if err := client.Do(testContext(t), "balloon", map[string]any{"value": mib << 20}, nil); err != nil {
			t.Fatal(err)
		}
		churned(t, &guest, began+uint64(i/2)+1)
	}
	if m := get(t, l.B, "m"); m.GetState() != stateActive {
		t.Errorf("the migration was %v before the guest had given anything back", m.GetState())
	}
	if err := client.Disconnect(); err != nil {
		t.Error(err)
	}
	if out, code := operate(t, l.A, "bandwidth", "m", "none"); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	m := await(t, control(t, l.B), "m", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("the migration is %v: %v", m.GetState(), m.GetError())
	}
	if m.GetProgress().GetBytesDiscarded() < 64<<20 {
		t.Errorf("the guest gave %d bytes back", m.GetProgress().GetBytesDiscarded())
	}
	churned(t, &guest, began+4)
	verified, err := port.Verify(testContext(t))
	if err != nil || verified.Corruptions != 0 || verified.Pages == 0 {
		t.Errorf("the guest checked %+v: %v", verified, err)
	}
	t.Logf("the guest gave %d MiB back while %d pages came", m.GetProgress().GetBytesDiscarded()>>20, m.GetProgress().GetPagesTotal())
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// churned waits until the guest has used and freed its memory so often, and returns how often it has.
func churned(t *testing.T, guest *report.Log, times uint64) (n uint64) {
	t.Helper()
	if _, _, err := guest.Wait(testContext(t), guest.Len(), func(l report.Line) bool {
		if l.Window != nil {
			n = l.Window.Churned
		}
		return l.Window != nil && n >= times
	}); err != nil {
		t.Fatalf("the guest has freed its memory %d times, not %d: %v", n, times, err)
	}
	return n
}
