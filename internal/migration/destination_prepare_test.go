// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// attachTo prepares a migration of machine to the QEMU whose monitor is at path, and returns why it failed.
func attachTo(t *testing.T, path string, machine *migratedv1.SourceMachine) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := NewDestination(ctx, DestinationConfig{
		Dir: filepath.Join(t.TempDir(), "m1"), PipeDir: t.TempDir(), LogDir: t.TempDir(),
		Log: slog.New(slog.DiscardHandler),
		Request: &migratedv1.PrepareIncomingRequest{
			Id: "m1", Machine: machine, DestinationQmp: path, Token: "secret", Protocol: savesDevices,
		},
	})
	_, err := d.Prepare(ctx)
	if err == nil {
		t.Fatal("it was prepared")
	}
	<-d.Done()
	return err
}

// TestRefusedQEMUIsLeft: a QEMU that an operator named and that has another VM, or waits for a migration of QEMU's own,
// is refused. It goes on to wait, and can be used by whoever started it.
func TestRefusedQEMUIsLeft(t *testing.T) {
	listen := func(t *testing.T, vm *qemu.VM) {
		uri := map[string]string{"uri": "unix:" + filepath.Join(t.TempDir(), "incoming.sock")}
		if err := vm.QMP.Do(t.Context(), "migrate-incoming", uri, nil); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		prepare func(*testing.T, *qemu.VM)
		machine *migratedv1.SourceMachine
		says    string
	}{
		"another name": {nil, &migratedv1.SourceMachine{Name: "web-1"}, `"db-1"`},
		"another machine": {
			nil, &migratedv1.SourceMachine{Name: "db-1", MachineType: "pc-i440fx-7.2"}, "machine types differ",
		},
		"QEMU's own": {listen, &migratedv1.SourceMachine{Name: "db-1"}, "another migration"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "qmp.sock")
			vm := startQEMU(t, ramFile(t), filepath.Join(dir, "ours.sock"), path,
				"-name", "db-1", "-S", "-incoming", "defer")
			if c.prepare != nil {
				c.prepare(t, vm)
			}
			if err := attachTo(t, path, c.machine); !strings.Contains(err.Error(), c.says) || Remedy(err) == "" {
				t.Errorf("%v; %s", err, Remedy(err))
			}
			if err := vm.Alive(); err != nil {
				t.Fatalf("the QEMU that was refused: %v", err)
			}
			if state, err := vm.Status(t.Context()); err != nil || state != "inmigrate" {
				t.Errorf("the QEMU that was refused is %q: %v", state, err)
			}
			other, err := qemu.Attach(t.Context(), path)
			if err != nil {
				t.Fatalf("the monitor was not left: %v", err)
			}
			if err := qemuClaims.checkUnclaimed(other); err != nil {
				t.Error(err)
			}
			if err := other.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestComparedQEMUIsEnded: a QEMU that an operator named and that has the source's VM is ended when the migration fails
// later, because it may hold half of the VM's state.
func TestComparedQEMUIsEnded(t *testing.T) {
	dir := t.TempDir()
	ram := ramFile(t)
	startQEMU(t, ram, filepath.Join(dir, "a.sock"), filepath.Join(dir, "source.sock"), "-name", "db-1")
	s := SourceConfig{
		Spec: &migratedv1.MigrationSpec{Vm: filepath.Join(dir, "source.sock")}, Log: slog.New(slog.DiscardHandler),
	}
	var err error
	if s.Records, err = OpenRecords(filepath.Join(dir, "records")); err != nil {
		t.Fatal(err)
	}
	said, machine := CheckSource(t.Context(), s)
	if machine == nil {
		t.Fatalf("the source says %+v", said)
	}
	path := filepath.Join(dir, "destination.sock")
	vm := startQEMU(t, ramFile(t), filepath.Join(dir, "b.sock"), path, "-name", "db-1", "-S", "-incoming", "defer")
	err = attachTo(t, path, machine) // no page server is named
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if ended := vm.WaitExit(ctx); ended != nil {
		t.Errorf("after %q: %v", err, ended)
	}
}
