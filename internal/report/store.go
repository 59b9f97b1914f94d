// SPDX-License-Identifier: Apache-2.0

// Package report keeps the reports of migrations that are over, and says by plain rules what was slow in them.
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

// mostBytes bounds a file. Reports have some ten KB; what makes one long is what a QEMU has said in its error.
const mostBytes = 256 << 10

// A Store keeps the last reports in a directory, a file each. Any number of goroutines may use it.
type Store struct {
	dir  string
	most int
	log  *slog.Logger

	mu    sync.Mutex
	files []string             // names, the oldest first
	kept  map[string]time.Time // by name: when that migration had changed last, of those that this Store has written
}

// content is that of a file.
type content struct {
	Version uint32          `json:"version"`
	Report  json.RawMessage `json:"report"` // a Report
}

// Open uses dir, which need not exist, for as many reports. What is wrong with it is logged: a daemon for which VMs may
// be waiting serves without reports, too.
func Open(dir string, most int, log *slog.Logger) *Store {
	s := &Store{dir: dir, most: most, log: log, kept: make(map[string]time.Time)}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("the reports of earlier migrations cannot be read", "error", err)
	}
	written := make(map[string]time.Time)
	for _, e := range entries {
		name := e.Name()
		if strings.HasSuffix(name, ".tmp") { // of a daemon that ended while it wrote
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

// nameOf is the file's: a host can be both sides of a migration.
func nameOf(id string, role migratedv1.MigrationRole) string {
	return id + "." + migration.RoleName(role) + suffix
}

// Keep writes a report down, and removes the oldest where there are too many. One that it has written as it is is left
// alone.
func (s *Store) Keep(r *migratedv1.Report) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := r.GetMigration()
	name, changed := nameOf(m.GetId(), m.GetRole()), m.GetUpdateTime().AsTime()
	if at, is := s.kept[name]; s.most == 0 || is && at.Equal(changed) {
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

// trim removes the oldest files. The caller holds mu, or is alone.
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

// Has says whether there is a file for that migration.
func (s *Store) Has(id string, role migratedv1.MigrationRole) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.files, nameOf(id, role))
}

// Load reads a report; nil: there is none, or none that this daemon can read, which is logged.
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

// read reads a file of any version that this daemon knows.
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

// IDs are those of the migrations that there are files of, the last written first, each once.
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
