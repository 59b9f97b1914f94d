// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
)

// SharedDir is a directory that all hosts see, on the machine's own file system: the storage that VMs have their
// disks on. It is empty when a lab is made and gone when the lab is.
const SharedDir = "/run/shared"

// LocalDir is a directory on the machine's own file system that is the host's alone. It goes with the lab.
const LocalDir = "/run/local"

// makeStorage makes what the hosts' SharedDir and LocalDir are, in /var/tmp: /tmp may be a tmpfs, which is not what
// disks are on.
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
