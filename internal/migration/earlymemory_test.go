// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
)

// An earlyQEMUs is an early load between real QEMUs without daemons: a source that has booted, and destinations.
type earlyQEMUs struct {
	t     *testing.T
	state *earlyState
	ram   *pagesrv.RAM
}

// ramFile returns the path of a RAM file of 32 MiB.
func ramFile(t *testing.T) string {
	t.Helper()
	ram, err := os.CreateTemp("/dev/shm", "early-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(ram.Name()) })
	if err := errors.Join(ram.Truncate(32<<20), ram.Close()); err != nil {
		t.Fatal(err)
	}
	return ram.Name()
}

// newEarlyQEMUs saves the source's device state and opens its memory, to be read later.
func newEarlyQEMUs(t *testing.T) *earlyQEMUs {
	t.Helper()
	said := filepath.Join(t.TempDir(), "firmware")
	vm := startQEMU(t, ramFile(t), filepath.Join(t.TempDir(), "source.sock"), "",
		"-chardev", "file,id=said,path="+said, "-device", "isa-debugcon,iobase=0x402,chardev=said")
	awaitFirmware(t, said)
	ctx := t.Context()
	facts, err := vm.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	saver, err := vm.NewSaver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	saved, _, err := saver.SaveRunning(ctx, func() error { return nil })
	if errors.Is(err, qemu.ErrTooShort) {
		// The memory is read while the VM is stopped, and nothing runs in it: it does not matter when.
		if _, _, err = vm.Stop(ctx); err == nil {
			err = saver.Close(ctx)
		}
		if saver, _ = vm.NewSaver(ctx); err == nil {
			saved, err = saver.Save(ctx, false, nil)
		}
	}
	if err := errors.Join(err, saver.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	all, err := devicestate.Parse(saved)
	if err != nil {
		t.Fatal(err)
	}
	early, err := devicestate.Early(all)
	if err != nil {
		t.Fatal(err)
	}
	var blocks []pagesrv.Block
	for _, b := range facts.RAMBlocks {
		blocks = append(blocks, pagesrv.Block{
			ID: b.ID, Size: b.Size, PageSize: b.PageSize, PID: vm.Pid, Addr: b.Addr, Shared: !b.Private,
		})
	}
	ram, err := pagesrv.OpenRAM(blocks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ram.Close() })
	return &earlyQEMUs{t, &earlyState{
		head: devicestate.Head(facts.MachineType), sections: early, pages: map[earlyPage][]byte{},
	}, ram}
}

// awaitFirmware waits until SeaBIOS, whose messages go to that file, has run the option ROMs: it looks for a device to
// boot from after them.
func awaitFirmware(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		said, err := os.ReadFile(path)
		if strings.Contains(string(said), "No bootable device") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the firmware says %q (%v)", said, err)
		}
	}
}

// load has a new destination QEMU load the state. It returns that QEMU, its memory and the error.
func (e *earlyQEMUs) load() (vm *qemu.VM, blocks []ram.Block, memory *earlyMemory, err error) {
	e.t.Helper()
	ctx := e.t.Context()
	vm = startQEMU(e.t, ramFile(e.t), filepath.Join(e.t.TempDir(), "destination.sock"), "", "-S", "-incoming", "defer")
	facts, err := vm.Facts(ctx)
	if err != nil {
		e.t.Fatal(err)
	}
	blocks = facts.RAMBlocks
	if err := errors.Join(vm.PrepareIncoming(ctx), vm.RAM.Drop(ctx, blocks)); err != nil {
		e.t.Fatal(err)
	}
	if memory, err = newEarlyMemory(ctx, vm, blocks, e.state.pages); err != nil {
		e.t.Fatal(err)
	}
	carrier, err := newDeviceCarrier()
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(carrier.close)
	_, err = feedEarly(ctx, vm, carrier, e.state, memory)
	if closeErr := memory.close(ctx); err == nil && closeErr != nil {
		e.t.Error(closeErr)
	}
	return vm, blocks, memory, err
}

// TestEarlyMemory: pages that loading reads and that are not there become known, and come along the next time. Then
// QEMU loads the state, each section that reads memory is known, and none of its memory is left.
func TestEarlyMemory(t *testing.T) {
	e := newEarlyQEMUs(t)
	for try := 0; ; try++ {
		vm, blocks, memory, err := e.load()
		if try == 0 && len(memory.missed) == 0 {
			t.Fatal("QEMU has loaded option ROMs that nobody gave it")
		}
		if len(memory.missed) > 0 && try < earlyTries {
			t.Logf("try %d: %d pages were missed, first that at %#x of %s: %v", try, len(memory.missed),
				memory.missed[0].offset, blocks[memory.missed[0].block].ID, err)
			for _, p := range memory.missed {
				content := make([]byte, blocks[p.block].PageSize)
				if err := e.ram.Read(p.block, p.offset, content); err != nil {
					t.Fatal(err)
				}
				e.state.pages[p] = content
			}
			continue
		}
		if err != nil || len(memory.missed) > 0 {
			t.Fatalf("%d pages were missed: %v", len(memory.missed), err)
		}
		readers := memory.readers()
		if !slices.ContainsFunc(readers, func(i int) bool { return e.state.sections[i].Device() == "kvm-tpr-opt" }) {
			t.Errorf("memory is read by %v", readers)
		}
		touched := 0
		for _, pages := range memory.reads {
			touched += len(pages)
		}
		if touched != len(memory.touched()) || touched > len(e.state.pages) {
			t.Errorf("%d pages of %d were read, %d of them once", touched, len(e.state.pages), len(memory.touched()))
		}
		if err := errors.Join(vm.RAM.Drop(t.Context(), blocks), vm.RAM.CheckEmpty(blocks)); err != nil {
			t.Error(err)
		}
		noUserfaultfd(t, vm.Pid)
		return
	}
}

// noUserfaultfd checks that the process has no userfaultfd: nothing is registered any more.
func noUserfaultfd(t *testing.T, pid int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if link, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil && strings.Contains(link, "userfaultfd") {
			t.Errorf("QEMU keeps %s", link)
		}
	}
}
