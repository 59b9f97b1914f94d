// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// TestContLock checks that QEMU never continues a VM that was handed over, however often a client tries. The VM has
// disks or none, it is locked before or after QEMU gives the disks up, and the QMP connection and this side's
// descriptor are closed.
func TestContLock(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args   []string
		before bool
	}{
		"no disk":                       {nil, false},
		"no disk, locked while it runs": {nil, true},
		"an image without locks": {[]string{"-blockdev", "driver=file,node-name=f,locking=off,filename=" + image,
			"-device", "virtio-blk-pci,drive=f"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := qemutest.Context(t)
			_, vm := qemutest.Start(t, append(qemutest.RAM(qemutest.RAMFile(t)), c.args...)...)
			lock, err := vm.NewContLock(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := vm.Stop(ctx); err != nil { // nothing is locked yet: the VM may be continued
				t.Fatal(err)
			}
			if _, err := vm.Cont(ctx); err != nil {
				t.Errorf("continue before it is locked: %v", err)
			}
			if c.before {
				if err := lock.Lock(); err != nil {
					t.Fatal(err)
				}
			}
			save(t, vm, true)
			if err := errors.Join(lock.Lock(), lock.Close()); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, err := vm.Cont(ctx); !errors.Is(err, qmp.ErrGeneric) {
					t.Errorf("continue: %v", err)
				}
			}
			if running, err := vm.Running(ctx); err != nil || running {
				t.Errorf("it runs: %t, %v", running, err)
			}
			if err := vm.QMP.Disconnect(); err != nil { // the socket serves one client at a time
				t.Fatal(err)
			}
			again, err := qemu.Attach(ctx, vm.QMP.Path())
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			if err := again.RemoveContLock(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := again.Cont(ctx); err != nil {
				t.Errorf("continue without the lock: %v", err)
			}
		})
	}
}

// TestContLockIsRemoved checks that removal leaves nothing in QEMU. It is no error to remove a lock twice, or one that
// an earlier NewContLock made.
func TestContLockIsRemoved(t *testing.T) {
	ctx := qemutest.Context(t)
	p, vm := qemutest.Start(t)
	before := descriptorsOf(t, p)
	for range 2 {
		lock, err := vm.NewContLock(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(lock.Lock(), lock.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := vm.RemoveContLock(ctx); err != nil {
			t.Error(err)
		}
	}
	if after := descriptorsOf(t, p); after != before {
		t.Errorf("QEMU had %d descriptors, and has %d", before, after)
	}
}

func descriptorsOf(t *testing.T, p *launch.Process) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
