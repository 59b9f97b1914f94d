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
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A Record says that this host is handing a VM over, or has done so. While a committed record exists, the daemon does
// not continue that VM.
type Record struct {
	Version uint32 `json:"version"`
	ID      string `json:"id"`
	VM      string `json:"vm"` // path of the QMP socket
	process.Identity
	Destination string `json:"destination"`
	// Committed says that the commit point has been passed. Before that, a restarted daemon uses the record only to
	// continue a VM that was stopped when the daemon died.
	Committed bool `json:"committed"`
	// Completed says that all memory has left, and nothing of the VM is needed here.
	Completed bool `json:"completed,omitempty"`
	// Ended is the Reason of a VM that ended by itself at the destination; 0: it did not.
	Ended int32 `json:"ended,omitempty"`
	// Defined is what the destination said of the domain's definition there: see WatchIncomingResponse; nil: nothing.
	Defined    *bool     `json:"defined,omitempty"`
	HandedOver time.Time `json:"handed_over"` // when the VM was about to stop
	// Times to show, and Due, by which all memory has to be at the destination. Older daemons did not write them.
	Created time.Time `json:"created,omitzero"`
	Started time.Time `json:"started,omitzero"`
	Over    time.Time `json:"over,omitzero"`
	Due     time.Time `json:"due,omitzero"` // zero also if there is no limit

	// What a restarted daemon needs to go on with the migration.
	Protocol   uint32          `json:"protocol"`
	Spec       json.RawMessage `json:"spec"` // a MigrationSpec
	Token      string          `json:"token"`
	WasRunning bool            `json:"was_running"`
	Settings   *qemu.Settings  `json:"settings"` // to restore in QEMU; protocol 1 only
	// RAMFiles are the files to remove when the QEMU of a completed migration has ended.
	RAMFiles []ram.File `json:"ram_files,omitempty"`
	// Blocks is the VM's memory in the order that both daemons agreed on; empty with protocol 1.
	Blocks []keptBlock `json:"ram_blocks,omitempty"`
}

// Records keeps the hand-over records of this host, one file each. The directory should be on a file system in memory,
// as /run is. A record is about a stopped QEMU process, so it is worth nothing after a reboot, and writing it to memory
// adds nothing to the downtime.
type Records struct {
	dir string
}

// OpenRecords uses the directory dir, and makes it if it does not exist.
func OpenRecords(dir string) (*Records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of the hand-over records: %w", err)
	}
	return &Records{dir: dir}, nil
}

func (r *Records) path(id string) string { return filepath.Join(r.dir, id+".json") }

// Prepare writes a record durably: the VM of rec is about to stop. It also writes the committed form to a file beside
// it, so that Commit adds only a rename to the downtime.
func (r *Records) Prepare(rec Record) error {
	if _, err := os.Lstat(r.path(rec.ID)); err == nil {
		return withRemedy(fmt.Errorf("%s is the hand-over record of another migration of that id", r.path(rec.ID)),
			"choose another id; see what the record is about with 'migrated list'")
	}
	rec.Version = version.State
	rec.Committed = true
	err := writeJSON(r.commitPath(rec.ID), rec)
	if err == nil {
		rec.Committed = false
		err = writeJSON(r.path(rec.ID), rec)
	}
	if err != nil {
		return fmt.Errorf("write the hand-over record of %s: %w", rec.ID, err)
	}
	return nil
}

// Commit turns the prepared record into a committed one. It is durable when Commit returns.
func (r *Records) Commit(id string) error {
	err := os.Rename(r.commitPath(id), r.path(id))
	if err == nil {
		err = atomicfile.SyncDir(r.dir)
	}
	if err != nil {
		return fmt.Errorf("commit the hand-over record of %s: %w", id, err)
	}
	return nil
}

// Complete notes durably that nothing of the VM is needed here any more. ended is the reason of a VM that ended by
// itself. files are files of its memory that remain when QEMU has ended.
func (r *Records) Complete(id string, ended migratedv1.Reason, files []ram.File) error {
	err := r.change(id, func(rec *Record) {
		rec.Completed, rec.Ended, rec.RAMFiles, rec.Over = true, int32(ended), files, time.Now()
	})
	if err != nil {
		return fmt.Errorf("complete the hand-over record of %s: %w", id, err)
	}
	return nil
}

// noteDefined notes durably what the destination said of the domain's definition there.
func (r *Records) noteDefined(id string, defined bool) error {
	if err := r.change(id, func(rec *Record) { rec.Defined = &defined }); err != nil {
		return fmt.Errorf("hand-over record of %s: %w", id, err)
	}
	return nil
}

// change reads a record, changes it, and writes it durably.
func (r *Records) change(id string, change func(*Record)) error {
	var rec Record
	data, err := os.ReadFile(r.path(id))
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if err != nil {
		return err
	}
	change(&rec)
	return writeJSON(r.path(id), rec)
}

// commitPath returns the path of the file that Commit renames.
func (r *Records) commitPath(id string) string { return filepath.Join(r.dir, id+".commit") }

// writeJSON writes a file atomically. It is durable when writeJSON returns.
func writeJSON(path string, content any) error {
	data, err := json.Marshal(content)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}

// Remove removes a record. A record that does not exist is no error.
func (r *Records) Remove(id string) error {
	for _, path := range []string{r.path(id), r.commitPath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the hand-over record of %s: %w", id, err)
		}
	}
	return nil
}

// All returns every record that can be read, including those of earlier runs of the daemon. A record of a newer version
// is an error.
func (r *Records) All() ([]Record, error) {
	records, _, err := r.readAll()
	return records, err
}

// Damaged returns the ids of the records that cannot be read, and why. The errors have remedies. Which VMs these
// records are about is not known.
func (r *Records) Damaged() (map[string]error, error) {
	_, damaged, err := r.readAll()
	return damaged, err
}

// readAll returns the records that can be read, and for every other one its id and why.
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
			continue // another goroutine has just removed it
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

// Sweep removes the remains of a daemon that ended while it wrote: files that are not whole, and commit files without a
// record, whose VMs the daemon had not begun to stop.
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

// find returns the record of migration id.
func (r *Records) find(id string) (rec Record, found bool, err error) {
	data, err := os.ReadFile(r.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, false, nil
	}
	if err == nil {
		rec, err = readRecord(data, r.path(id))
	}
	return rec, err == nil, err
}

// readRecord decodes a record of any version that this daemon knows. The error has a remedy.
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
	err = withReason(fmt.Errorf("hand-over record %s is damaged: %w", path, err),
		migratedv1.Reason_REASON_STATE_UNREADABLE)
	return withRemedy(err, "look where the VM that it is about runs, then remove the file")
}

// stoppedBy returns the record of an earlier migration that stopped the VM of process pid, and ended before it handed
// the VM over. Its ID is empty if there is none.
func (r *Records) stoppedBy(pid int) (Record, error) {
	rec, _, err := r.ofProcess(pid, false)
	return rec, err
}

// ForVM returns the record of the VM whose QEMU is process pid, if the VM was handed over and is still stopped here. A
// VM is found by its process because it may have several monitors.
func (r *Records) ForVM(pid int) (Record, bool, error) { return r.ofProcess(pid, true) }

// remedyOfProc says what to do where the kernel does not tell whether a process runs.
const remedyOfProc = "see why this daemon cannot read /proc, for example too many open files " +
	"(LimitNOFILE= of its unit), then try again"

// ofProcess returns the record, committed or not, of the VM whose QEMU is process pid. It fails where it cannot tell
// whether that process is still the one of the record.
func (r *Records) ofProcess(pid int, committed bool) (Record, bool, error) {
	records, err := r.All()
	if err != nil {
		return Record{}, false, err
	}
	for _, rec := range records {
		if rec.Committed != committed || rec.PID != pid {
			continue
		}
		switch err := rec.Check(); {
		case err == nil:
			return rec, true, nil
		case !errors.Is(err, process.ErrEnded):
			return Record{}, false, withRemedy(fmt.Errorf("hand-over record of %s: %w", rec.ID, err), remedyOfProc)
		}
	}
	return Record{}, false, nil
}
