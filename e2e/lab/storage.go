// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
)

// SharedDir is a directory on the machine's file system that all hosts share, for the disks of VMs. It is empty when a
// lab is made, and is removed with the lab.
const SharedDir = "/run/shared"

// LocalDir is a directory on the machine's file system that belongs to one host. It is removed with the lab.
const LocalDir = "/run/local"

// makeStorage makes the directories of the hosts' SharedDir and LocalDir in /var/tmp. /tmp may be a tmpfs, which is no
// storage for disks.
func (l *Lab) makeStorage() (err error) {
	if l.storage, err = os.MkdirTemp("/var/tmp", "migrated-lab-"); err != nil {
		return fmt.Errorf("storage of the lab: %w", err)
	}
	return l.makeDir("shared")
}

// makeDir makes one directory of the lab's storage. An unprivileged QEMU may write there.
func (l *Lab) makeDir(name string) error {
	path := filepath.Join(l.storage, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	return os.Chown(path, nobody, nobody)
}
