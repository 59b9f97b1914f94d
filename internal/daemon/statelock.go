// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/migration"
)

// lockState locks the state directory for the life of this daemon. It fails if another daemon has it: both would take
// up the same migrations and give orders to the same QEMUs. unlock releases the lock. The kernel does so, too, when
// this process ends in any way.
//
// A directory in which nothing can be locked is used without a lock, as VMs that arrived before may wait for this
// daemon.
func (d *Daemon) lockState() (unlock func(), err error) {
	path := filepath.Join(d.cfg.StateDir, "lock")
	f, err := lockFile(path)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil, migration.WithRemedy(fmt.Errorf("another daemon uses the state directory %s", d.cfg.StateDir),
			"stop the other daemon, which 'fuser "+path+"' shows, or give this one another --state-dir")
	case err != nil:
		d.log.Warn("cannot lock the state directory: another daemon could use it, too", "error", err,
			"remedy", "have state_dir on a file system with locks, and let the daemon lock files there (deploy/selinux)")
		return func() {}, nil
	}
	return func() { _ = f.Close() }, nil // nothing was written to it
}

// lockFile opens a file, which it makes if it does not exist, and locks it (flock(2)). The lock is held until all
// descriptors of the open file are closed. Programs that this process starts do not inherit one, since Go opens files
// with O_CLOEXEC. The error is EWOULDBLOCK if the file is locked.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}
