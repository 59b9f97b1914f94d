// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	source      = migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE
	destination = migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION
)

var quiet = slog.New(slog.DiscardHandler)

// over returns the report of a migration that ended at a time, in Unix seconds.
func over(id string, role migratedv1.MigrationRole, seconds int64) *migratedv1.Report {
	r := plain()
	r.Migration.Id, r.Migration.Role, r.Migration.UpdateTime = id, role, timestamppb.New(time.Unix(seconds, 0))
	return r
}

func keep(t *testing.T, s *Store, r *migratedv1.Report) {
	t.Helper()
	if err := s.Keep(r); err != nil {
		t.Fatal(err)
	}
}

// TestKeepOverRestarts: a Store opened again has the reports of both sides of a migration, and takes a newer one.
func TestKeepOverRestarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "reports")
	a, b := over("m.source", source, 1), over("m.source", destination, 2)
	s := Open(dir, 5, quiet)
	keep(t, s, a)
	keep(t, s, b)
	s = Open(dir, 5, quiet)
	for _, want := range []*migratedv1.Report{a, b} {
		role := want.GetMigration().GetRole()
		if got := s.Load("m.source", role); !proto.Equal(got, want) || !s.Has("m.source", role) {
			t.Errorf("of the %v there is %v", role, got)
		}
	}
	if s.Load("m", source) != nil || s.Has("m", source) || s.Load("../x", source) != nil {
		t.Error("there is a report of a migration that was not")
	}
	a.Migration.UpdateTime, a.Migration.Location = timestamppb.New(time.Unix(9, 0)), migratedv1.Location_LOCATION_SOURCE
	keep(t, s, a)
	if got := s.Load("m.source", source); !proto.Equal(got, a) {
		t.Errorf("after a change there is %v", got)
	}
	if got := s.IDs(); !slices.Equal(got, []string{"m.source"}) {
		t.Errorf("there are %v", got)
	}
}

// TestRemovesTheOldest: the reports that were written first are removed first, also those of an earlier run.
func TestRemovesTheOldest(t *testing.T) {
	dir := t.TempDir()
	s := Open(dir, 3, quiet)
	for i := range 5 {
		keep(t, s, over(fmt.Sprint("m", i), source, int64(100-i))) // the clock does not matter
	}
	keep(t, s, over("m2", source, 200)) // is the newest now
	if got := s.IDs(); !slices.Equal(got, []string{"m2", "m4", "m3"}) {
		t.Errorf("kept are %v", got)
	}
	for i, id := range []string{"m3", "m4", "m2"} {
		written := time.Unix(int64(1000+i), 0)
		if err := os.Chtimes(filepath.Join(dir, id+".source.json"), written, written); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "m9.source.json.1.tmp"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = Open(dir, 2, quiet)
	if got := s.IDs(); !slices.Equal(got, []string{"m2", "m4"}) {
		t.Errorf("after a restart with fewer kept are %v", got)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("the directory has %v (%v)", entries, err)
	}
	s = Open(dir, 0, quiet)
	keep(t, s, over("m5", source, 1))
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("with none to be kept there are %v (%v)", entries, err)
	}
}

// TestPassesOver: a file that cannot be read is logged, and Load returns nil.
func TestPassesOver(t *testing.T) {
	dir := t.TempDir()
	whole := Open(dir, 9, quiet)
	keep(t, whole, over("good", source, 1))
	text, err := os.ReadFile(filepath.Join(dir, "good.source.json"))
	if err != nil {
		t.Fatal(err)
	}
	for id, content := range map[string]string{
		"cut":     string(text[:len(text)/2]),
		"empty":   "",
		"other":   `{"version":1,"report":[]}`,
		"unsaid":  `{"report":{}}`,
		"future":  fmt.Sprintf(`{"version":%d,"report":{}}`, version.State+1),
		"endless": string(text) + strings.Repeat(" ", mostBytes),
	} {
		if err := os.WriteFile(filepath.Join(dir, id+".source.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		s := Open(dir, 9, slog.New(slog.NewTextHandler(&log, nil)))
		if r := s.Load(id, source); r != nil || !strings.Contains(log.String(), id+".source.json") {
			t.Errorf("%s: there is %v; logged was %q", id, r, log.String())
		}
		if s.Load("good", source) == nil {
			t.Errorf("%s: the one beside it is passed over, too", id)
		}
	}
	// Fields that a newer daemon has added are ignored.
	added := strings.Replace(string(text), `"report":{`, `"added":1,"report":{"added":{"x":1},`, 1)
	if err := os.WriteFile(filepath.Join(dir, "added.source.json"), []byte(added), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := Open(dir, 9, quiet).Load("added", source); r.GetMigration().GetId() != "good" {
		t.Errorf("with a field that is not known there is %v", r)
	}
}

// TestTooLong: a report that is too long is refused, and the earlier one stays.
func TestTooLong(t *testing.T) {
	dir := t.TempDir()
	s := Open(dir, 9, quiet)
	r := over("m", source, 1)
	keep(t, s, r)
	long := over("m", source, 2)
	long.Migration.Error = &migratedv1.MigrationError{Message: strings.Repeat("x", mostBytes)}
	if err := s.Keep(long); err == nil || !strings.Contains(err.Error(), "migration m") {
		t.Errorf("it is kept: %v", err)
	}
	if got := s.Load("m", source); !proto.Equal(got, r) {
		t.Errorf("there is %v", got)
	}
}

// TestKeepsWithoutADirectory: if the directory cannot be used, Open logs it, and Keep fails.
func TestKeepsWithoutADirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	s := Open(filepath.Join(file, "reports"), 3, slog.New(slog.NewTextHandler(&log, nil)))
	if err := s.Keep(over("m", source, 1)); err == nil || log.Len() == 0 || s.Has("m", source) {
		t.Errorf("kept in a file: %v, logged %q", err, log.String())
	}
}

// TestReadsVersion1: later daemons read what this one writes; see internal/version.
func TestReadsVersion1(t *testing.T) {
	r, err := read(filepath.Join("testdata", "state-v1", "m1.destination.json"))
	if err != nil {
		t.Fatal(err)
	}
	if want := over("m1", destination, 1); !proto.Equal(r, want) {
		t.Errorf("%v", r)
	}
}
