// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/internal/version"
)

// FuzzTakeUpKept: damaged files give an error, and never more page states than the file has.
func FuzzTakeUpKept(f *testing.F) {
	f.Add([]byte(`{"version":1,"request":{"id":"m1","protocol":1},`+
		`"ram_blocks":[{"id":"a","addr":4096,"size":4096,"page_size":4096}]}`), make([]byte, keptHeaderSize+8))
	f.Add([]byte(`{"version":1,"request":{"id":1}}`), []byte{})
	f.Add([]byte(`{"version":1,"ram_blocks":[{"size":18446744073709551615,"page_size":1}]}`), make([]byte, keptHeaderSize))
	f.Add([]byte(`[]`), []byte("x"))
	f.Fuzz(func(t *testing.T, facts, states []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, keptFacts), facts, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, keptStates), states, 0o600); err != nil {
			t.Fatal(err)
		}
		k, parsed, request, err := takeUpKept(dir)
		if err != nil {
			return
		}
		if parsed == nil || request == nil || len(k.states()) != len(states)-keptHeaderSize {
			t.Errorf("taken up: %v, %v, %d bytes of states", parsed, request, len(k.states()))
		}
		if err := k.close(); err != nil {
			t.Error(err)
		}
	})
}

// FuzzRecords: a record that can be read can be written and read again; everything else is an error.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"m1","vm":"/q","pid":1,"start_time":2,"boot_id":"b","protocol":1,` +
		`"spec":{},"settings":{"capabilities":{"x":true}}}`))
	f.Add([]byte(`{"version":4294967295}`))
	f.Add([]byte(`null`))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := OpenRecords(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(r.path("m1"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		all, err := r.All()
		if damaged, damagedErr := r.Damaged(); err != nil || damagedErr != nil || len(damaged) > 0 {
			return
		}
		if len(all) != 1 || all[0].Version != version.State {
			t.Fatalf("read %v", all)
		}
		rec := all[0]
		if rec.ID = "m1"; len(rec.Spec) == 0 {
			rec.Spec = []byte("{}")
		}
		if err := errors.Join(r.Remove("m1"), r.Prepare(rec)); err != nil {
			t.Errorf("%+v cannot be written: %v", rec, err)
		}
	})
}
