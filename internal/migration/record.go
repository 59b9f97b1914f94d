// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/internal/atomicfile"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A Record says that this host is handing a VM over, or has done so. While a
// committed one exists the daemon does not continue that VM.
type Record struct {
	Version uint32 `json:"version"`
	ID      string `json:"id"`
	VM      string `json:"vm"` // path of the QMP socket
	qemu.Identity
	Destination string `json:"destination"`
	// Committed: the commit point has been passed. Before that the record only
	// serves to continue a VM whose daemon died while it was stopped.
	Committed bool `json:"committed"`
	// Completed: all memory has left, and nothing of the VM is needed here.
	Completed bool `json:"completed,omitempty"`
	// Ended is why, of a VM that ended by itself at the destination; 0: it did not.
	Ended      int32     `json:"ended,omitempty"`
	HandedOver time.Time `json:"handed_over"` // when the VM was about to stop

	// What a restarted daemon needs to go on.
	Protocol   uint32          `json:"protocol"`
	Spec       json.RawMessage `json:"spec"` // a MigrationSpec
	Token      string          `json:"token"`
	WasRunning bool            `json:"was_running"`
	Settings   *qemu.Settings  `json:"settings"` // to be put back in QEMU; of protocol 1 alone
	// RAMFiles are to be removed when the QEMU of a completed migration has ended.
	RAMFiles []qemu.RAMFile `json:"ram_files,omitempty"`
	// Blocks is the VM's memory, in the order that was agreed on; none: of protocol 1.
	Blocks []keptBlock `json:"ram_blocks,omitempty"`
}

// Records keeps the hand-over records of this host, one file each. The
// directory should be on a file system in memory, as /run is: a record is
// about a stopped QEMU process and worth nothing once the host has rebooted,
// and there writing one down costs the downtime nothing.
type Records struct {
	dir string
}

// OpenRecords uses dir, making it where it is missing.
func OpenRecords(dir string) (*Records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of the hand-over records: %w", err)
	}
	return &Records{dir: dir}, nil
}

func (r *Records) path(id string) string { return filepath.Join(r.dir, id+".json") }

// Prepare writes down, durably, that the VM of rec is about to stop, and all but
// the commitment itself: Commit then costs the downtime a rename and no more.
func (r *Records) Prepare(rec Record) error {
	if _, err := os.Lstat(r.path(rec.ID)); err == nil {
		return withRemedy(fmt.Errorf("%s is the hand-over record of another migration of that id", r.path(rec.ID)),
			"choose another id; see what the record is about with 'migrated list'")
	}
	rec.Version = version.State
	rec.Committed = true
	err := writeJSON(r.committed(rec.ID), rec)
	if err == nil {
		rec.Committed = false
		err = writeJSON(r.path(rec.ID), rec)
	}
	if err != nil {
		return fmt.Errorf("write the hand-over record of %s: %w", rec.ID, err)
	}
	return nil
}

// Commit makes the prepared record a committed one, durably, before it returns.
func (r *Records) Commit(id string) error {
	err := os.Rename(r.committed(id), r.path(id))
	if err == nil {
		err = atomicfile.SyncDir(r.dir)
	}
	if err != nil {
		return fmt.Errorf("commit the hand-over record of %s: %w", id, err)
	}
	return nil
}

// Complete notes, durably, that nothing of the VM is needed here any more, and files of its memory that QEMU leaves; ended
// is the reason of a VM that ended.
func (r *Records) Complete(id string, ended migratedv1.Reason, files []qemu.RAMFile) error {
	var rec Record
	data, err := os.ReadFile(r.path(id))
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if err == nil {
		rec.Completed, rec.Ended, rec.RAMFiles = true, int32(ended), files
		err = writeJSON(r.path(id), rec)
	}
	if err != nil {
		return fmt.Errorf("complete the hand-over record of %s: %w", id, err)
	}
	return nil
}

func (r *Records) committed(id string) string { return filepath.Join(r.dir, id+".commit") }

// writeJSON makes a file appear whole or not at all, and durable before it returns.
func writeJSON(path string, content any) error {
	data, err := json.Marshal(content)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}

// Remove forgets a record; one that does not exist is no error.
func (r *Records) Remove(id string) error {
	for _, path := range []string{r.path(id), r.committed(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the hand-over record of %s: %w", id, err)
		}
	}
	return nil
}

// All reads every record, also those that an earlier daemon left, but for the damaged ones. One of a newer version is an
// error.
func (r *Records) All() ([]Record, error) {
	records, _, err := r.readAll()
	return records, err
}

// Damaged are the records that nobody can read, and why; the errors have remedies. Which VMs they are about is not known.
func (r *Records) Damaged() (map[string]error, error) {
	_, damaged, err := r.readAll()
	return damaged, err
}

func (r *Records) readAll() (records []Record, damaged map[string]error, err error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read the hand-over records: %w", err)
	}
	damaged = make(map[string]error)
	for _, entry := range entries {
		id, isRecord := strings.CutSuffix(entry.Name(), ".json")
		if !isRecord {
			continue
		}
		data, err := os.ReadFile(filepath.Join(r.dir, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed just now
		}
		if err != nil {
			damaged[id] = damagedRecord(r.path(id), err)
			continue
		}
		rec, err := readRecord(data, r.path(id))
		var newer *version.Error
		switch {
		case errors.As(err, &newer):
			return nil, nil, err
		case err == nil && rec.ID != id:
			err = damagedRecord(r.path(id), fmt.Errorf("it is about migration %q", rec.ID))
		}
		if err != nil {
			damaged[id] = err
			continue
		}
		records = append(records, rec)
	}
	return records, damaged, nil
}

// Sweep removes what a daemon left that ended while it wrote: files that were not whole, and commitments of VMs that it
// had not begun to stop.
func (r *Records) Sweep() error {
	entries, err := os.ReadDir(r.dir)
	errs := []error{err}
	for _, entry := range entries {
		name := entry.Name()
		id, isCommit := strings.CutSuffix(name, ".commit")
		if isCommit {
			_, err := os.Lstat(r.path(id))
			isCommit = errors.Is(err, fs.ErrNotExist)
		}
		if isCommit || strings.HasSuffix(name, ".tmp") {
			errs = append(errs, os.Remove(filepath.Join(r.dir, name)))
		}
	}
	return errors.Join(errs...)
}

// of returns the record of a migration.
func (r *Records) of(id string) (rec Record, found bool, err error) {
	data, err := os.ReadFile(r.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, false, nil
	}
	if err == nil {
		rec, err = readRecord(data, r.path(id))
	}
	return rec, err == nil, err
}

// readRecord reads a record of any version that this daemon knows. The error has a remedy.
func readRecord(data []byte, path string) (rec Record, err error) {
	if err := json.Unmarshal(data, &struct {
		Version *uint32 `json:"version"`
	}{&rec.Version}); err != nil {
		return Record{}, damagedRecord(path, err)
	}
	if err := version.CheckState("hand-over record "+path, rec.Version); err != nil {
		return Record{}, withRemedy(err, otherDaemon)
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		return Record{}, damagedRecord(path, err)
	}
	if err := version.CheckProtocol("hand-over record "+path, rec.Protocol); err != nil {
		return Record{}, withRemedy(err, otherDaemon)
	}
	return rec, nil
}

func damagedRecord(path string, err error) error {
	err = withReason(fmt.Errorf("hand-over record %s is damaged: %w", path, err), migratedv1.Reason_REASON_STATE_UNREADABLE)
	return withRemedy(err, "look where the VM that it is about runs, then remove the file")
}

// ForVM returns the record of a VM that was handed over and is still stopped here, by its QEMU's process: it may have
// several monitors.
func (r *Records) ForVM(pid int) (Record, bool, error) {
	records, err := r.All()
	if err != nil {
		return Record{}, false, err
	}
	for _, rec := range records {
		if rec.Committed && rec.PID == pid && rec.Alive() {
			return rec, true, nil
		}
	}
	return Record{}, false, nil
}
