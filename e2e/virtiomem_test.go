// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestVirtioMemShrinksAndGrows: a guest moves that has most of its memory from a virtio-mem device; while its pages come,
// memory is taken from it and given again.
func TestVirtioMemShrinksAndGrows(t *testing.T) {
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	vm := lab.VMConfig{
		VCPUs: 2, MemoryMiB: 320, Nodes: 1, Kernel: kernel, Initrd: initrd,
		KernelArgs: []string{"memhp_default_state=online_movable", "migrated.mem=96", "migrated.workers=1", "migrated.rate=500", "migrated.churn=96"},
		Extra: []string{
			"-m", "320M,maxmem=1G", "-object", "memory-backend-file,id=mem1,size=512M,mem-path=/dev/shm/mem1,share=on",
			"-device", "virtio-mem-pci,id=vmem0,memdev=mem1,requested-size=384M",
		},
	}
	startVM(t, l.A, vm, lab.EventsArgs()...)
	var guest report.Log
	port := openGuest(t, l.A, &guest)
	churned(t, &guest, 1)
	awaitPlugged(t, l.A, func(mib uint64) bool { return mib == 384 })
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	if out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "m", "--bandwidth", "2M", "--detach"); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	await(t, control(t, l.A), "m", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	port = openGuest(t, l.B, &guest)
	began := churned(t, &guest, 0)
	resize(t, l.B, 128)
	awaitPlugged(t, l.B, func(mib uint64) bool { return mib < 384 })
	resize(t, l.B, 512)
	awaitPlugged(t, l.B, func(mib uint64) bool { return mib == 512 })
	if m := get(t, l.B, "m"); m.GetState() != stateActive {
		t.Errorf("the migration was %v before the guest had given anything back", m.GetState())
	}
	if out, code := operate(t, l.A, "bandwidth", "m", "none"); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	m := await(t, control(t, l.B), "m", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("the migration is %v: %v", m.GetState(), m.GetError())
	}
	churned(t, &guest, began+2)
	verified, err := port.Verify(testContext(t))
	if err != nil || verified.Corruptions != 0 || verified.Pages == 0 {
		t.Errorf("the guest checked %+v: %v", verified, err)
	}
	t.Logf("the guest gave %d MiB back meanwhile", m.GetProgress().GetBytesDiscarded()>>20)
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

const vmem = "/machine/peripheral/vmem0"

// resize asks the guest to have so much of the device.
func resize(t *testing.T, h *lab.Host, mib uint64) {
	t.Helper()
	client, err := qmp.Dial(testContext(t), h.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Do(testContext(t), "qom-set", map[string]any{"path": vmem, "property": "requested-size", "value": mib << 20}, nil); err != nil {
		t.Fatal(err)
	}
	if err := client.Disconnect(); err != nil {
		t.Error(err)
	}
}

// awaitPlugged waits until the guest has as much of the device as ok wants.
func awaitPlugged(t *testing.T, h *lab.Host, ok func(mib uint64) bool) {
	t.Helper()
	client, err := qmp.Dial(testContext(t), h.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	for size := uint64(0); ; time.Sleep(50 * time.Millisecond) {
		if err := client.Do(testContext(t), "qom-get", map[string]any{"path": vmem, "property": "size"}, &size); err != nil {
			t.Fatalf("the guest has %d MiB of the device: %v", size>>20, err)
		}
		if ok(size >> 20) {
			break
		}
	}
	if err := client.Disconnect(); err != nil {
		t.Error(err)
	}
}
