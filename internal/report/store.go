// SPDX-License-Identifier: Apache-2.0

// Package report keeps the reports of migrations that are over, and finds out by rules what was slow in them.
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/atomicfile"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// mostBytes is the largest file. Reports usually have about ten KB; a long error message of a QEMU makes one larger.
const mostBytes = 256 << 10

// A Store keeps the last reports in a directory, one in a file. Several goroutines may use it at once.
type Store struct {
	dir  string
	most int
	log  *slog.Logger

	mu    sync.Mutex
	files []string             // names of files, the oldest first
	kept  map[string]time.Time // by name of a file that this Store has written: the update time of its migration
}

// content is the content of a file.
type content struct {
	Version uint32          `json:"version"`
	Report  json.RawMessage `json:"report"` // a Report of the API
}

// Open returns a Store of at most most reports in dir, which need not exist. It logs errors and does not fail, because
// VMs may wait for the daemon, which can serve without reports.
func Open(dir string, most int, log *slog.Logger) *Store {
	s := &Store{dir: dir, most: most, log: log, kept: make(map[string]time.Time)}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("the reports of earlier migrations cannot be read", "error", err)
	}
	written := make(map[string]time.Time)
	for _, e := range entries {
		name := e.Name()
		if strings.HasSuffix(name, ".tmp") { // left by a daemon that ended while writing
			s.remove(name)
			continue
		}
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || !strings.HasSuffix(name, suffix) {
			continue
		}
		written[name] = info.ModTime()
		s.files = append(s.files, name)
	}
	slices.SortStableFunc(s.files, func(a, b string) int { return written[a].Compare(written[b]) })
	s.trim()
	return s
}

const suffix = ".json"

// nameOf returns the name of a report's file. It has the role, because a host can be both sides of a migration.
func nameOf(id string, role migratedv1.MigrationRole) string {
	return id + "." + migration.RoleName(role) + suffix
}

// Keep writes a report, and removes the oldest ones if there are too many. It does nothing if it has written this
// report before and its migration has not changed since.
func (s *Store) Keep(r *migratedv1.Report) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := r.GetMigration()
	name, changed := nameOf(m.GetId(), m.GetRole()), m.GetUpdateTime().AsTime()
	if written, found := s.kept[name]; s.most == 0 || found && written.Equal(changed) {
		return nil
	}
	if err := s.write(name, r); err != nil {
		return fmt.Errorf("keep the report of migration %s: %w", m.GetId(), err)
	}
	s.kept[name] = changed
	s.files = append(slices.DeleteFunc(s.files, func(old string) bool { return old == name }), name)
	s.trim()
	return nil
}

func (s *Store) write(name string, r *migratedv1.Report) error {
	text, err := protojson.Marshal(r)
	if err != nil {
		return err
	}
	text, err = json.Marshal(content{Version: version.State, Report: text})
	if err != nil {
		return err
	}
	if len(text) > mostBytes {
		return fmt.Errorf("it has %d bytes, and at most %d are kept", len(text), mostBytes)
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(s.dir, name), text, 0o600)
}

// trim removes the oldest files while there are too many. The caller holds mu, or is Open.
func (s *Store) trim() {
	for len(s.files) > s.most {
		s.remove(s.files[0])
		delete(s.kept, s.files[0])
		s.files = s.files[1:]
	}
}

func (s *Store) remove(name string) {
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("an old report stays", "error", err)
	}
}

// Has says whether there is a report of that side of a migration.
func (s *Store) Has(id string, role migratedv1.MigrationRole) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.files, nameOf(id, role))
}

// Delete removes the reports of both sides of a migration.
func (s *Store) Delete(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, role := range []migratedv1.MigrationRole{
		migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
	} {
		name := nameOf(id, role)
		if !slices.Contains(s.files, name) {
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the report of migration %s: %w", id, err)
		}
		s.files = slices.DeleteFunc(s.files, func(old string) bool { return old == name })
		delete(s.kept, name)
	}
	return nil
}

// Load reads a report; nil: there is none, or it cannot be read, which is logged.
func (s *Store) Load(id string, role migratedv1.MigrationRole) *migratedv1.Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := nameOf(id, role)
	if !slices.Contains(s.files, name) {
		return nil
	}
	path := filepath.Join(s.dir, name)
	r, err := read(path)
	if err != nil {
		s.log.Warn("a report is passed over", "error", err)
		return nil
	}
	return r
}

// read reads a file, of any version that this daemon knows.
func read(path string) (*migratedv1.Report, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, mostBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > mostBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", path, mostBytes)
	}
	var c content
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := version.CheckState(path, c.Version); err != nil {
		return nil, err
	}
	r := &migratedv1.Report{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(c.Report, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// IDs returns the ids of the migrations that have reports, the last written first, each id once.
func (s *Store) IDs() (ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range slices.Backward(s.files) {
		name = strings.TrimSuffix(name, suffix)
		id := name[:max(0, strings.LastIndexByte(name, '.'))]
		if id != "" && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}
