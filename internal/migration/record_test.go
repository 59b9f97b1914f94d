// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/version"
)

func TestRecordsOutliveTheDaemon(t *testing.T) {
	vm := qemu.VM{Pid: os.Getpid()} // this process stands in for a QEMU
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
		Destination: "192.0.2.2:7600", HandedOver: time.Now().Round(0).UTC(), Spec: []byte(`{"vm":"x"}`),
		Token: "t", WasRunning: true,
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

// A record that cannot be read is reported: it may be about a VM that runs elsewhere. Other records can still be used.
func TestDamagedRecordIsNamed(t *testing.T) {
	records, err := OpenRecords(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := records.Prepare(Record{ID: "good", Protocol: version.Protocol, Spec: []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"m1.json": `{"id":"m1"`, "m2.json": "", "m3.json": `{"version":1,"id":"good","protocol":2}`,
	} {
		if err := os.WriteFile(filepath.Join(records.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := records.All(); err != nil || len(all) != 1 || all[0].ID != "good" {
		t.Errorf("All() = %v, %v", all, err)
	}
	damaged, err := records.Damaged()
	if err != nil || len(damaged) != 3 {
		t.Errorf("Damaged() = %v, %v", damaged, err)
	}
	for id, why := range damaged {
		if Remedy(why) == "" || !strings.Contains(why.Error(), records.path(id)) {
			t.Errorf("of %s it says %v; %s", id, why, Remedy(why))
		}
		if err := records.Prepare(Record{ID: id, Protocol: version.Protocol}); err == nil {
			t.Errorf("the damaged record of %s is overwritten", id)
		}
	}
}

// TestSweep: the remains of a daemon that ended while it wrote are removed, and nothing else.
func TestSweep(t *testing.T) {
	records, err := OpenRecords(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := records.Prepare(Record{ID: "good", Protocol: version.Protocol, Spec: []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"m1.json.123.tmp", "m2.commit"} {
		if err := os.WriteFile(filepath.Join(records.dir, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := records.Sweep(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(records.dir)
	if err != nil || len(left) != 2 || left[0].Name() != "good.commit" || left[1].Name() != "good.json" {
		t.Errorf("it left %v, %v", left, err)
	}
}

// A file that a crash in the middle of Write left is not a record.
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
