// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// StateDirs returns the directories below a daemon's state directory from which a restarted daemon takes up migrations:
// records is the directory of Records, incoming is the one that KeptDirs reads.
func StateDirs(stateDir string) (records, incoming string) {
	return filepath.Join(stateDir, "handed-over"), filepath.Join(stateDir, "incoming")
}

// UnderWay returns the sorted ids of the migrations in a daemon's state directory that are not over. For each of them a
// VM waits for the daemon, or this host has the only copy of the VM's memory. A file that cannot be read counts as such
// a migration, because it may be one. UnderWay changes nothing and may be called while a daemon runs.
func UnderWay(stateDir string) (ids []string, err error) {
	handedOver, incoming := StateDirs(stateDir)
	records, damaged, err := (&Records{dir: handedOver}).readAll()
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no directory: no daemon has run since the host was started
		return nil, err
	}
	for _, rec := range records {
		if !rec.Completed { // else the record is about a QEMU that is no longer needed
			ids = append(ids, rec.ID)
		}
	}
	for id := range damaged {
		ids = append(ids, id)
	}
	dirs, err := KeptDirs(incoming)
	if err != nil {
		return nil, fmt.Errorf("migrations to this host: %w", err)
	}
	for _, dir := range dirs {
		if !keptIsClosed(dir) {
			ids = append(ids, filepath.Base(dir))
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// keptIsClosed reports whether the files of a migration to this host say nothing but how it ended.
func keptIsClosed(dir string) bool {
	k, _, _, err := takeUpKept(dir)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) // it was removed just now
	}
	closed := k.header().closed.Load() != 0
	return k.close() == nil && closed
}
