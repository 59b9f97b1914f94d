// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A reserve is memory that a destination holds for a VM which was promised all of its memory, from the time at which
// its QEMU has dropped what it had preallocated until the VM's pages take its place. The kernel cannot set memory aside
// otherwise: what is allocated is there, and raises no fault. Huge pages are set aside by the kernel.
type reserve struct {
	mu   sync.Mutex
	file *os.File // a memfd(2); nil: nothing is held
	held int64
}

// errNoReserve says that the host lacks the memory that a VM was promised.
var errNoReserve = errors.New("this host has not the memory that the VM was promised (prealloc=on or mem-lock=on)")

const (
	// reserveStep is how much is taken at a time: what the host has is asked before each.
	reserveStep = 64 << 20
	// reserveLeaves is what must stay for others: the kernel that finds no more memory ends processes, perhaps another
	// VM's.
	reserveLeaves = 256 << 20
)

// reserveFor takes the memory of all blocks that are to be populated. available says how many bytes the host has to
// give.
func reserveFor(blocks []qemu.RAMBlock, available func() (uint64, error)) (_ *reserve, err error) {
	r := &reserve{}
	var size int64
	for _, b := range blocks {
		if b.Populated && b.PageSize == uint64(os.Getpagesize()) {
			size += int64(b.Size)
		}
	}
	if size == 0 {
		return r, nil
	}
	fd, err := unix.MemfdCreate("reserve", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("file to reserve memory with: %w", err)
	}
	r.file = os.NewFile(uintptr(fd), "reserve")
	for r.held < size {
		if err := enough(uint64(size-r.held), available); err != nil {
			return nil, errors.Join(err, r.file.Close())
		}
		step := min(size-r.held, reserveStep)
		if err := unix.Fallocate(fd, 0, r.held, step); err != nil {
			return nil, errors.Join(tooLittle(fmt.Errorf("%d MiB: %w", size>>20, err)), r.file.Close())
		}
		r.held += step
	}
	return r, nil
}

// enough says whether the host has so many bytes to give, and something left.
func enough(bytes uint64, available func() (uint64, error)) error {
	has, err := available()
	if err != nil {
		return err
	}
	if has < bytes+reserveLeaves {
		return tooLittle(fmt.Errorf("%d MiB are missing, and %d MiB are available", bytes>>20, has>>20))
	}
	return nil
}

func tooLittle(err error) error {
	return withRemedy(fmt.Errorf("%w: %w", errNoReserve, err),
		"free memory at the destination, or start the VM without that promise")
}

// availableMemory is what the kernel estimates that it can give without taking from others (MemAvailable in
// proc_meminfo(5)).
func availableMemory() (uint64, error) { return meminfo("MemAvailable") }

// meminfo is a figure of proc_meminfo(5), in bytes.
func meminfo(name string) (uint64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib uint64
		if n, _ := fmt.Sscanf(line, name+": %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("/proc/meminfo does not say %s", name)
}

// checkPromise refuses a VM whose memory this host cannot have, before a QEMU is started that takes it.
func checkPromise(machine *migratedv1.SourceMachine, available func() (uint64, error)) error {
	var size uint64
	for _, b := range machine.GetRamBlocks() {
		if b.GetPopulated() && b.GetPageSize() == uint64(os.Getpagesize()) {
			size += b.GetSize()
		}
	}
	if size == 0 {
		return nil
	}
	return enough(size, available)
}

// keep gives back all but so many bytes: the rest of the VM has come.
func (r *reserve) keep(bytes uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	surplus := r.held - int64(min(bytes, uint64(r.held)))
	if r.file == nil || surplus == 0 {
		return nil
	}
	r.held -= surplus
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	return unix.Fallocate(int(r.file.Fd()), mode, r.held, surplus)
}

// release gives all of it back.
func (r *reserve) release() error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return nil
	}
	file := r.file
	r.file, r.held = nil, 0
	return file.Close()
}
