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
)

// A Record says that this host handed a VM over. While it exists the daemon
// does not continue that VM.
type Record struct {
	ID          string    `json:"id"`
	VM          string    `json:"vm"` // path of the QMP socket
	PID         int       `json:"pid"`
	Destination string    `json:"destination"`
	HandedOver  time.Time `json:"handed_over"`
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

// Write makes rec durable before it returns: file and directory are synced.
func (r *Records) Write(rec Record) error {
	if err := r.write(rec); err != nil {
		return fmt.Errorf("write the hand-over record of %s: %w", rec.ID, err)
	}
	return nil
}

func (r *Records) write(rec Record) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(r.dir, rec.ID+".*.tmp")
	if err != nil {
		return err
	}
	_, err = temp.Write(append(data, '\n'))
	if err := errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	if err := os.Rename(temp.Name(), r.path(rec.ID)); err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	dir, err := os.Open(r.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Remove forgets a record; one that does not exist is no error.
func (r *Records) Remove(id string) error {
	if err := os.Remove(r.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the hand-over record of %s: %w", id, err)
	}
	return nil
}

// All reads every record, also those that an earlier daemon left.
func (r *Records) All() ([]Record, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("read the hand-over records: %w", err)
	}
	var records []Record
	for _, entry := range entries {
		id, isRecord := strings.CutSuffix(entry.Name(), ".json")
		if !isRecord {
			continue
		}
		data, err := os.ReadFile(filepath.Join(r.dir, entry.Name()))
		if err != nil {
			return nil, fmt.Errorf("read the hand-over record of %s: %w", id, err)
		}
		var rec Record
		if err := json.Unmarshal(data, &rec); err != nil {
			return nil, fmt.Errorf("hand-over record %s is damaged; look at the VM it is about before removing it: %w",
				r.path(id), err)
		}
		records = append(records, rec)
	}
	return records, nil
}

// ForVM returns the record of a VM that was handed over and is still stopped
// here: same socket, same QEMU process.
func (r *Records) ForVM(vm string, pid int) (Record, bool, error) {
	records, err := r.All()
	if err != nil {
		return Record{}, false, err
	}
	for _, rec := range records {
		if rec.VM == vm && rec.PID == pid {
			return rec, true, nil
		}
	}
	return Record{}, false, nil
}
