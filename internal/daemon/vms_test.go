// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestHandedOverVMs: an evacuation leaves out a QEMU only if all of its VM has left and the VM does not run here. One
// whose migration failed after the commit is named, with what to do. One that its operator has continued is the VM.
func TestHandedOverVMs(t *testing.T) {
	d := startPlain(t)
	own := filepath.Join(t.TempDir(), "own.sock") // a monitor has room for one client
	options := qemutest.Options(t, qemutest.Self(), "-S", "-qmp", "unix:"+own+",server=on,wait=off")
	socket := options.QMPPath
	options.QMPPath = own
	_, vm := qemutest.StartWith(t, nil, options)
	identity, err := vm.Identity()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.records.Prepare(migration.Record{
		ID: "m1", VM: socket, Identity: identity, Destination: "192.0.2.1:7600", Protocol: 1, WasRunning: true,
	}), d.records.Commit("m1")); err != nil {
		t.Fatal(err)
	}
	look := func(all []*migratedv1.HostVM, err error) *migratedv1.HostVM {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		at := slices.IndexFunc(all, func(one *migratedv1.HostVM) bool { return int(one.GetPid()) == identity.PID })
		if at < 0 {
			return nil
		}
		return all[at]
	}
	host, fallBack := evacuatedHost{d}, "migrated fallback m1"

	shown := look(host.VMs(t.Context()))
	if shown == nil || shown.GetHandedOver() || !strings.Contains(shown.GetProblem(), fallBack) {
		t.Fatalf("after a failure behind the commit: %v", shown)
	}
	checked := host.Check(t.Context(), shown.GetVm())
	if checked.Err == nil || !strings.Contains(migration.Remedy(checked.Err), fallBack) {
		t.Errorf("it may be moved: %v; remedy %q", checked.Err, migration.Remedy(checked.Err))
	}

	if _, err := vm.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	if shown := look(host.VMs(t.Context())); shown == nil || shown.GetHandedOver() || shown.GetProblem() != "" {
		t.Errorf("continued here: %v", shown)
	}
	if err := d.records.Complete("m1", migratedv1.Reason_REASON_UNSPECIFIED, nil); err != nil {
		t.Fatal(err)
	}
	if shown := look(host.VMs(t.Context())); shown == nil || shown.GetHandedOver() {
		t.Errorf("moved, and continued here: %v", shown)
	}
	if _, _, err := vm.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if shown := look(host.VMs(t.Context())); shown != nil {
		t.Errorf("moved, and kept for its memory: %v", shown)
	}
	if shown := look(d.vms(t.Context())); shown == nil || !shown.GetHandedOver() {
		t.Errorf("in the list of VMs it is %v", shown)
	}
}
