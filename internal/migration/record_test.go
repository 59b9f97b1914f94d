// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/version"
)

func TestRecordsOutliveTheDaemon(t *testing.T) {
	vm := qemu.VM{Pid: os.Getpid()} // no QEMU is needed to be a process
	identity, err := vm.Identity()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "handed-over")
	records, err := OpenRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := Record{
		Version: version.State, ID: "m1", Protocol: 1, VM: "/run/vm/qmp.sock", Identity: identity,
		Destination: "192.0.2.2:7600", HandedOver: time.Now().Round(0).UTC(), Spec: []byte(`{"vm":"x"}`), Token: "t", WasRunning: true,
	}
	if err := records.Prepare(want); err != nil {
		t.Fatal(err)
	}

	again, err := OpenRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	all, err := again.All()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Record{want}, all); diff != "" {
		t.Errorf("prepared (-want +got):\n%s", diff)
	}
	if _, found, err := again.ForVM(want.PID); err != nil || found {
		t.Errorf("what is only prepared was handed over: %v, %v", found, err)
	}
	if err := again.Commit("m1"); err != nil {
		t.Fatal(err)
	}
	want.Committed = true
	if all, err = again.All(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Record{want}, all); diff != "" {
		t.Errorf("committed (-want +got):\n%s", diff)
	}
	for _, c := range []struct {
		pid  int
		want bool
	}{
		{want.PID, true},
		{want.PID + 1, false}, // a new QEMU at the same socket
	} {
		if _, got, err := again.ForVM(c.pid); err != nil || got != c.want {
			t.Errorf("ForVM(%d) = %v, %v; want %v", c.pid, got, err, c.want)
		}
	}
	for range 2 { // the second is no error
		if err := again.Remove("m1"); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := again.All(); err != nil || len(all) != 0 {
		t.Errorf("after Remove there are %v, %v", all, err)
	}
}

// A record that can't be read must stop the daemon: it may be about a VM that
// runs elsewhere.
func TestDamagedRecordIsAnError(t *testing.T) {
	dir := t.TempDir()
	records, err := OpenRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "m1.json"), []byte(`{"id":"m1"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := records.All(); err == nil {
		t.Errorf("a damaged record is taken for %v", all)
	}
}

// What a crash in the middle of Write leaves is not a record.
func TestHalfWrittenRecordIsNone(t *testing.T) {
	dir := t.TempDir()
	records, err := OpenRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "m1.123.tmp"), []byte(`{"id":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := records.All(); err != nil || len(all) != 0 {
		t.Errorf("All() = %v, %v", all, err)
	}
}
