// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A reserve holds memory for a VM that was promised all of its memory: from the time at which QEMU has dropped its
// preallocated memory until the VM's pages take its place. The kernel offers no other way to set memory aside:
// allocated memory is present and raises no fault. Huge pages need no reserve; the kernel keeps them.
type reserve struct {
	mu   sync.Mutex
	file *os.File // a memfd(2); nil: nothing is held
	held int64
}

// errNoReserve says that the host lacks memory that a VM was promised.
var errNoReserve = errors.New("the destination lacks memory for the VM's preallocated or locked RAM " +
	"(prealloc=on, mem-lock=on)")

const (
	// reserveStep is how many bytes are reserved at a time. Before each step the host is asked what it has.
	reserveStep = 64 << 20
	// reserveMargin is how many bytes must stay available for others. A kernel without memory ends processes, perhaps
	// another VM's.
	reserveMargin = 256 << 20
)

// reserveFor reserves the memory of all blocks that have Populated set and no huge pages. available returns how many
// bytes the host can give.
func reserveFor(blocks []ram.Block, available func() (uint64, error)) (_ *reserve, err error) {
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
		if err := checkAvailable(uint64(size-r.held), available); err != nil {
			return nil, errors.Join(err, r.file.Close())
		}
		step := min(size-r.held, reserveStep)
		if err := unix.Fallocate(fd, 0, r.held, step); err != nil {
			return nil, errors.Join(reserveError(fmt.Errorf("%d MiB: %w", size>>20, err)), r.file.Close())
		}
		r.held += step
	}
	return r, nil
}

// checkAvailable fails if the host cannot give so many bytes and keep reserveMargin.
func checkAvailable(bytes uint64, available func() (uint64, error)) error {
	has, err := available()
	if err != nil {
		return err
	}
	if has < bytes+reserveMargin {
		return reserveError(fmt.Errorf("%d MiB more are needed, %d MiB are available, and %d MiB of these must stay free",
			bytes>>20, has>>20, uint64(reserveMargin)>>20))
	}
	return nil
}

func reserveError(err error) error {
	return withRemedy(fmt.Errorf("%w: %w", errNoReserve, err),
		"free memory at the destination, or start the VM without prealloc=on and mem-lock=on")
}

// availableMemory returns how many bytes the kernel can give without swapping (MemAvailable in proc_meminfo(5)).
func availableMemory() (uint64, error) { return meminfo("MemAvailable") }

// meminfo returns a value of proc_meminfo(5) in bytes.
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

// checkPromise refuses a VM whose promised memory this host does not have, before its QEMU is started and takes it.
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
	return checkAvailable(size, available)
}

// shrink reduces the reserve to at most so many bytes; the VM's pages have taken the place of the rest.
func (r *reserve) shrink(bytes uint64) error {
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

// release returns the whole reserve to the kernel.
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
