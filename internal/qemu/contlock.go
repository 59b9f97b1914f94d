// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// ContLockNode is the name of the block node by which a ContLock works. An operator who wants the VM to run here
// although it may run elsewhere removes it, with QMP blockdev-del.
const ContLockNode = "migrated-moved"

// contLockName is under what name QEMU keeps the descriptor that holds the lock. It stays there when the connection
// ends, and this process with it.
const contLockName = libvirt.Staying + ContLockNode

// A ContLock keeps a QEMU from continuing a VM that has been handed over, whoever says so on whichever monitor, also
// of a VM without disks and on storage without locks.
//
// It is an image in memory which no device uses. QEMU gives it up together with the VM's disks when it saves the state
// of the devices, takes it back together with them when it is to continue the VM, and does not continue it where it
// cannot (bdrv_activate_all in qmp_cont). It cannot while somebody else says, by the lock of a byte of the image, that
// it does not share it (block/file-posix.c). That lock belongs to an open file that QEMU itself has, too: it lasts as
// long as that QEMU, whatever becomes of this process.
type ContLock struct {
	holder *os.File
}

// NewContLock adds the image to a VM. Nothing is locked yet. The error leaves the VM as it was.
func (vm *VM) NewContLock(ctx context.Context) (_ *ContLock, err error) {
	fail := func(err error) (*ContLock, error) {
		return nil, fmt.Errorf("lock that keeps QEMU from continuing the VM: %w", err)
	}
	if err := vm.RemoveContLock(ctx); err != nil { // of a migration that failed
		return fail(err)
	}
	image, holder, err := memoryFile(ContLockNode, os.O_RDWR)
	if err != nil {
		return fail(err)
	}
	defer image.Close() // QEMU has a duplicate
	l := &ContLock{holder: holder}
	if _, err = image.Write(contLockImage()); err == nil {
		err = vm.addContLock(ctx, image, holder)
	}
	if err != nil {
		return fail(errors.Join(err, l.Close(), vm.RemoveContLock(ctx)))
	}
	return l, nil
}

// addContLock gives QEMU the image, and the descriptor that is to hold the lock.
func (vm *VM) addContLock(ctx context.Context, image, holder *os.File) error {
	if err := vm.getFD(ctx, contLockName, holder); err != nil {
		return err
	}
	set, err := vm.addFD(ctx, image)
	if err != nil {
		return err
	}
	err = vm.QMP.Do(ctx, "blockdev-add", map[string]any{
		"node-name": ContLockNode, "driver": "qcow2",
		"file": map[string]any{"driver": "file", "filename": fdsetPath(set), "locking": "on"},
	}, nil)
	return errors.Join(err, vm.removeFD(ctx, set)) // the node has a descriptor of its own
}

// What QEMU looks at (RAW_LOCK_SHARED_BASE in block/file-posix.c, BLK_PERM_WRITE in include/block/block-common.h): who
// has this byte locked does not share the permission to write.
const (
	sharedBase = 200
	permWrite  = 1
)

// Lock makes QEMU refuse to continue the VM once it has given up its disks. It asks nobody.
func (l *ContLock) Lock() error {
	err := unix.FcntlFlock(l.holder.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{
		Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Start: sharedBase + permWrite, Len: 1,
	})
	if err != nil {
		return fmt.Errorf("lock that keeps QEMU from continuing the VM: %w", err)
	}
	return nil
}

// Close leaves the lock to QEMU.
func (l *ContLock) Close() error { return l.holder.Close() }

// RemoveContLock lets QEMU continue the VM again. That there is no lock is no error.
func (vm *VM) RemoveContLock(ctx context.Context) error {
	here, err := vm.hasContLock(ctx)
	if err != nil {
		return err
	}
	if here {
		if err := vm.QMP.Do(ctx, "blockdev-del", map[string]string{"node-name": ContLockNode}, nil); err != nil {
			return err
		}
	}
	// It may not be there, and is not this connection's where a daemon before this one handed it through libvirt.
	if err := vm.closeFD(ctx, contLockName); !errors.Is(err, qmp.ErrGeneric) {
		return err
	}
	return nil
}

// hasContLock says whether the image is there.
func (vm *VM) hasContLock(ctx context.Context) (bool, error) {
	var nodes []struct {
		Name string `json:"node-name"`
	}
	err := vm.QMP.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes)
	for _, n := range nodes {
		if n.Name == ContLockNode {
			return true, err
		}
	}
	return false, err
}

// contLockImage is an empty image of a format (docs/interop/qcow2.txt) whose nodes want to write for themselves, not
// only when a device does.
func contLockImage() []byte {
	const (
		cluster   = 512 // bytes, the fewest
		clusters  = 4   // header, table of counts, counts, table of the content
		magic     = 'Q'<<24 | 'F'<<16 | 'I'<<8 | 0xfb
		version   = 3
		headerLen = 104
		countBits = 4 // 1 << 4 bits each
	)
	image := make([]byte, clusters*cluster)
	put32 := func(at int, v uint32) { binary.BigEndian.PutUint32(image[at:], v) }
	put64 := func(at int, v uint64) { binary.BigEndian.PutUint64(image[at:], v) }
	put32(0, magic)
	put32(4, version)
	put32(20, 9)         // cluster_bits
	put64(40, 3*cluster) // l1_table_offset; l1_size and the size of the disk are 0
	put64(48, cluster)   // refcount_table_offset
	put32(56, 1)         // refcount_table_clusters
	put32(96, countBits) // refcount_order
	put32(100, headerLen)
	put64(cluster, 2*cluster)
	for i := range clusters {
		binary.BigEndian.PutUint16(image[2*cluster+2*i:], 1)
	}
	return image
}
