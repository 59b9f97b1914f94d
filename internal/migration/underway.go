// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// StateDirs are the directories below a daemon's state directory that a daemon which is started again goes by: that of
// the Records, and that which KeptDirs reads.
func StateDirs(stateDir string) (records, incoming string) {
	return filepath.Join(stateDir, "handed-over"), filepath.Join(stateDir, "incoming")
}

// UnderWay are the ids of the migrations that a daemon has left, or has, in its state directory and that are not over:
// a VM waits for that daemon, or the memory here is the only one of its VM. What cannot be read counts as one, because
// it may be. It changes nothing, and may be called beside a daemon that runs.
func UnderWay(stateDir string) (ids []string, err error) {
	handedOver, incoming := StateDirs(stateDir)
	records, damaged, err := (&Records{dir: handedOver}).readAll()
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no directory: no daemon has run since the host was started
		return nil, err
	}
	for _, rec := range records {
		if !rec.Completed { // else a QEMU is there yet that nobody needs
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
		if !isSettled(dir) {
			ids = append(ids, filepath.Base(dir))
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// isSettled says of a migration to this host whether nothing but word of it is kept in its directory.
func isSettled(dir string) bool {
	k, _, _, err := takeUpKept(dir)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) // it was forgotten just now
	}
	settled := k.header().settled.Load() != 0
	return k.close() == nil && settled
}
