// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// ContLockNode is the name of the block node that a ContLock uses. An operator removes it with QMP blockdev-del to run
// the VM here although it may run elsewhere.
const ContLockNode = "migrated-moved"

// contLockName is the name under which QEMU keeps the descriptor that holds the lock. The descriptor stays in QEMU when
// the QMP connection or this process ends.
const contLockName = libvirt.Staying + ContLockNode

// A ContLock makes QEMU refuse to continue a VM that has been handed over. It holds for every monitor and every client.
// It also works for a VM without disks, and on storage without locks.
//
// The lock uses a disk image in memory that belongs to no device. QEMU gives the image up with the VM's disks when it
// saves the device state. To continue the VM, QEMU must take all disks and the image back; otherwise it refuses
// (bdrv_activate_all in qmp_cont). Taking the image back fails while another open file has a lock on one byte of it,
// which says that the image is not shared (block/file-posix.c). QEMU itself holds a descriptor of that open file, so
// the lock lasts as long as QEMU does, even when this process ends.
type ContLock struct {
	holder *os.File
}

// NewContLock adds the image to the VM's QEMU. It locks nothing yet. When it fails, the VM is as it was before.
func (vm *VM) NewContLock(ctx context.Context) (_ *ContLock, err error) {
	fail := func(err error) (*ContLock, error) {
		return nil, fmt.Errorf("lock that keeps QEMU from continuing the VM: %w", err)
	}
	if err := vm.RemoveContLock(ctx); err != nil { // left by a migration that failed
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

// addContLock gives QEMU the image and the descriptor that will hold the lock.
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

// The byte of the image that QEMU checks (RAW_LOCK_SHARED_BASE in block/file-posix.c, BLK_PERM_WRITE in
// include/block/block-common.h). A lock on it means that its holder does not share the permission to write.
const (
	sharedBase = 200
	permWrite  = 1
)

// Lock makes QEMU refuse to continue the VM once it has given up its disks. Lock sends no command to QEMU.
func (l *ContLock) Lock() error {
	err := unix.FcntlFlock(l.holder.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{
		Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Start: sharedBase + permWrite, Len: 1,
	})
	if err != nil {
		return fmt.Errorf("lock that keeps QEMU from continuing the VM: %w", err)
	}
	return nil
}

// Close closes this process's descriptor. QEMU keeps its own, and with it the lock.
func (l *ContLock) Close() error { return l.holder.Close() }

// RemoveContLock removes image and lock, so that QEMU can continue the VM again. It returns nil when there is no lock.
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
	// closefd fails when there is no lock. It also fails when an earlier daemon gave QEMU the descriptor through libvirt:
	// this connection does not own it then.
	if err := vm.closeFD(ctx, contLockName); !errors.Is(err, qmp.ErrGeneric) {
		return err
	}
	return nil
}

// hasContLock reports whether QEMU has the image.
func (vm *VM) hasContLock(ctx context.Context) (bool, error) {
	nodes, err := vm.blockNodes(ctx)
	return slices.ContainsFunc(nodes, func(n blockNode) bool { return n.Name == ContLockNode }), err
}

// contLockImage returns an empty qcow2 image (docs/interop/qcow2.txt). A qcow2 node needs the permission to write for
// itself, even when no device uses it.
func contLockImage() []byte {
	const (
		cluster   = 512 // bytes; the minimum
		clusters  = 4   // header, refcount table, refcount block, L1 table
		magic     = 'Q'<<24 | 'F'<<16 | 'I'<<8 | 0xfb
		version   = 3
		headerLen = 104
		countBits = 4 // log2 of the bits of a refcount
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
