// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// networkFileSystems are the file systems that several hosts can mount. The numbers are from linux/magic.h and from the
// sources of the file systems.
var networkFileSystems = map[int64]bool{
	unix.NFS_SUPER_MAGIC:   true,
	unix.SMB_SUPER_MAGIC:   true,
	unix.CIFS_SUPER_MAGIC:  true,
	unix.SMB2_SUPER_MAGIC:  true,
	unix.CEPH_SUPER_MAGIC:  true,
	unix.OCFS2_SUPER_MAGIC: true,
	unix.AFS_SUPER_MAGIC:   true,
	unix.CODA_SUPER_MAGIC:  true,
	unix.V9FS_MAGIC:        true,
	unix.FUSE_SUPER_MAGIC:  true, // glusterfs, sshfs and others
	0x01161970:             true, // gfs2
	0x0BD00BD0:             true, // lustre
	0x47504653:             true, // gpfs
	0x19830326:             true, // beegfs
}

// IsShared says whether a file is on a file system that several hosts can mount.
func IsShared(path string) (bool, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return false, err
	}
	return networkFileSystems[stat.Type], nil
}

// checkNotShared refuses a path at which a QEMU, when it starts, would empty or replace a file that another host has
// too: the VM runs there, and that file may be its QEMU's. Nothing at this host tells whether it is in use.
func checkNotShared(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() && info.Mode()&fs.ModeSocket == 0 {
		return nil // QEMU makes a file, or writes to a device or a pipe
	}
	shared := false
	if err == nil {
		shared, err = IsShared(path)
	}
	if err != nil {
		return fmt.Errorf("a file that the destination's QEMU would replace or empty: %w", err)
	}
	if shared {
		return fmt.Errorf("%s is on a file system that hosts share: it may be in use by the QEMU that runs the VM, "+
			"and the destination's QEMU would replace or empty it: give the destination a path of its own with a template, "+
			"or start the QEMU there yourself (--to-qmp); remove the file only if no host uses it", path)
	}
	return nil
}
