// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestUnderWay(t *testing.T) {
	dir := t.TempDir()
	expect := func(when string, want ...string) {
		t.Helper()
		got, err := UnderWay(dir)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s (-want +got): %v\n%s", when, err, diff)
		}
	}
	expect("no daemon has run")

	handedOver, incoming := StateDirs(dir)
	records, err := OpenRecords(handedOver)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} {
		if err := records.Prepare(Record{ID: id, Protocol: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if err := records.Complete("a", migratedv1.Reason_REASON_UNSPECIFIED, nil); err != nil {
		t.Fatal(err)
	}
	expect("one was completed", "b")
	write(t, filepath.Join(handedOver, "c.json"), "{")
	expect("one is damaged", "b", "c")

	var files []*keptFiles
	for _, id := range []string{"d", "e"} {
		if err := os.MkdirAll(filepath.Join(incoming, id), 0o755); err != nil {
			t.Fatal(err)
		}
		k, err := createKept(filepath.Join(incoming, id), &keptFactsV1{}, &migratedv1.PrepareIncomingRequest{Protocol: 1})
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, k)
	}
	files[0].header().closed.Store(1)
	expect("one to this host is over", "b", "c", "e")
	write(t, filepath.Join(incoming, "d", keptStates), "")
	expect("it cannot be read any more", "b", "c", "d", "e")

	write(t, filepath.Join(handedOver, "c.json"), `{"version": 1000, "id": "c"}`)
	var newer *version.Error
	if ids, err := UnderWay(dir); !errors.As(err, &newer) {
		t.Errorf("a record of a newer daemon: %v, %v", ids, err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
