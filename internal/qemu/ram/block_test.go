// SPDX-License-Identifier: Apache-2.0

package ram_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// checkFirstPages writes to the block that is said to begin at the guest's address 0, and lets QEMU read the guest's
// memory there.
func checkFirstPages(t *testing.T, vm *qemu.VM, b ram.Block) {
	t.Helper()
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid), os.O_RDWR, 0)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	defer memory.Close()
	for _, offset := range []uint64{0x10000, b.Size - b.PageSize} {
		mark := []byte(fmt.Sprintf("mark of %s at %d", b.ID, offset))
		if _, err := memory.WriteAt(mark, int64(b.Addr+offset)); err != nil {
			t.Fatal(err)
		}
		dump := filepath.Join(t.TempDir(), "dump")
		args := map[string]any{"val": offset, "size": len(mark), "filename": dump}
		if err := vm.QMP.Do(qemutest.Context(t), "pmemsave", args, nil); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(dump); err != nil || !bytes.Equal(got, mark) {
			t.Errorf("block %+v at offset %d: %q, %v", b, offset, got, err)
		}
	}
}

func TestRAMBlocks(t *testing.T) {
	named, gone, two, private := qemutest.RAMFile(t), qemutest.RAMFile(t), qemutest.RAMFile(t), qemutest.RAMFile(t)
	dir := filepath.Dir(named)
	backend := func(kind string) []string {
		return []string{
			"-m", "64", "-object", "memory-backend-" + kind + ",id=ram0,size=64M", "-machine", "memory-backend=ram0",
		}
	}
	nodes := func(a, b string) []string {
		return []string{"-m", "64", "-smp", "2",
			"-object", "memory-backend-" + b + ",id=b,size=32M", "-numa", "node,nodeid=0,cpus=0,memdev=b",
			"-object", "memory-backend-" + a + ",id=a,size=32M", "-numa", "node,nodeid=1,cpus=1,memdev=a"}
	}
	for _, test := range []struct {
		name    string
		args    []string
		want    []string // ids of RAM; the first holds the guest's first page
		private bool
	}{
		{"default", []string{"-m", "64"}, []string{"pc.ram"}, true},
		{"named file", qemutest.RAM(named), []string{"ram0"}, false},
		{"directory", qemutest.RAM(dir), []string{"ram0"}, false},
		{"removed file", qemutest.RAM(gone), []string{"ram0"}, false},
		{"file, private", backend("file,share=off,mem-path=" + private), []string{"ram0"}, true},
		{"file on a disk, private", backend("file,share=off,mem-path=" + filepath.Join(t.TempDir(), "ram")),
			[]string{"ram0"}, true},
		{"ram", backend("ram"), []string{"ram0"}, true},
		{"ram, shared", backend("ram,share=on"), []string{"ram0"}, false},
		{"memfd", backend("memfd"), []string{"ram0"}, false},
		{"memfd, private", backend("memfd,share=off"), []string{"ram0"}, true},
		{"two nodes", nodes("file,share=on,mem-path="+two+"a", "file,share=on,mem-path="+two+"b"), []string{"b", "a"}, false},
		{"two nodes in one directory", nodes("file,share=on,mem-path="+dir, "file,share=on,mem-path="+dir),
			[]string{"b", "a"}, false},
		{"two nodes of memfd", nodes("memfd", "memfd"), []string{"b", "a"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := qemutest.Start(t, append(test.args, "-S")...)
			if test.name == "removed file" {
				if err := os.Remove(gone); err != nil {
					t.Fatal(err)
				}
			}
			blocks, err := vm.RAM.Blocks(qemutest.Context(t))
			if err != nil {
				t.Fatal(err)
			}
			byID := map[string]ram.Block{}
			for _, b := range blocks {
				byID[b.ID] = b
				if b.PageSize != uint64(os.Getpagesize()) || b.Size%b.PageSize != 0 {
					t.Errorf("block %+v", b)
				}
			}
			for i, id := range test.want {
				b := byID[id]
				if b.Size != 64<<20/uint64(len(test.want)) || b.Private != test.private ||
					!b.IsBackend() || b.HoldsFirstPage != (i == 0) {
					t.Errorf("block %+v", b)
				}
				if b.Path != "" && !b.Private {
					qemutest.CheckBlock(t, vm, b)
				}
			}
			checkFirstPages(t, vm, byID[test.want[0]])
			if bios := byID["pc.bios"]; bios.Size == 0 || !bios.Private || bios.IsBackend() {
				t.Errorf("firmware %+v of %v", bios, byID)
			}
			if len(test.want) == 2 && byID["a"].FileIdentity == byID["b"].FileIdentity {
				t.Error("two files have one identity")
			}
		})
	}
}

// TestRAMBlocksOfDevices checks that blocks outside the guest's address space are found as well: boot ROMs of cards,
// ACPI tables, video memory.
func TestRAMBlocksOfDevices(t *testing.T) {
	_, vm := qemutest.Start(t, "-m", "64", "-device", "VGA", "-device", "virtio-net-pci,addr=5", "-S")
	blocks, err := vm.RAM.Blocks(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, b := range blocks {
		ids = append(ids, b.ID)
	}
	for _, want := range []string{"pc.ram", "pc.bios", "/rom@etc/acpi/tables", "0000:00:05.0/virtio-net-pci.rom"} {
		if !slices.Contains(ids, want) {
			t.Errorf("there is no %q in %q", want, ids)
		}
	}
	if !slices.ContainsFunc(ids, func(id string) bool { return strings.HasSuffix(id, "/vga.vram") }) ||
		!slices.IsSorted(ids) {
		t.Errorf("blocks %q", ids)
	}
}

func TestHugePages(t *testing.T) {
	dir := qemutest.HugePages(t, 32)
	_, vm := qemutest.Start(t, append(qemutest.RAM(dir), "-S")...)
	blocks, err := vm.RAM.Blocks(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b ram.Block) bool { return b.ID == "ram0" })
	if b := blocks[at]; b.PageSize != 2<<20 || b.Private {
		t.Errorf("block %+v", b)
	}
	qemutest.CheckBlock(t, vm, blocks[at])
}

func TestRAMThatCannotMove(t *testing.T) {
	_, vm := qemutest.Start(t, append(qemutest.RAM(filepath.Join(t.TempDir(), "ram")), "-S")...)
	_, err := vm.RAM.Blocks(qemutest.Context(t))
	var bad *ram.Error
	if err == nil {
		testenv.CannotRun(t, "temporary files are on tmpfs here")
	}
	if !errors.As(err, &bad) || !strings.Contains(bad.Reason, "tmpfs") || bad.Remedy == "" {
		t.Errorf("error %v", err)
	}
}

// TestPluggedMemory checks that plugged-in memory is listed like any other. A later comparison shows whether the
// destination has it.
func TestPluggedMemory(t *testing.T) {
	path, dimm := qemutest.RAMFile(t), qemutest.RAMFile(t)
	_, vm := qemutest.Start(t, append(qemutest.RAM(path), "-m", "64,slots=2,maxmem=1G")...)
	ctx := qemutest.Context(t)
	object := map[string]any{
		"qom-type": "memory-backend-file", "id": "extra", "size": 128 << 20, "share": true, "mem-path": dimm,
	}
	device := map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "extra"}
	if err := vm.QMP.Do(ctx, "object-add", object, nil); err != nil {
		t.Fatal(err)
	}
	count := func() int {
		t.Helper()
		blocks, err := vm.RAM.Blocks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return len(blocks)
	}
	before := count() // no device uses it yet
	if err := vm.QMP.Do(ctx, "device_add", device, nil); err != nil {
		t.Fatal(err)
	}
	if after := count(); after != before+1 {
		t.Errorf("%d blocks became %d", before, after)
	}
}

// TestReadOnlyImage checks that Drop leaves a read-only image alone.
func TestReadOnlyImage(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, bytes.Repeat([]byte("image "), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	_, vm := qemutest.Start(t, "-m", "64,slots=2,maxmem=1G", "-machine", "nvdimm=on", "-S", "-incoming", "defer",
		"-object", "memory-backend-file,id=nv,size=8M,share=on,readonly=on,mem-path="+image,
		"-device", "nvdimm,memdev=nv,unarmed=on")
	blocks, err := vm.RAM.Blocks(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b ram.Block) bool { return b.ID == "nv" })
	if at < 0 || !blocks[at].ReadOnly || blocks[at].Size != 8<<20 {
		t.Fatalf("blocks %+v", blocks)
	}
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.RAM.Drop(qemutest.Context(t), blocks); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(image); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image was changed: %v", err)
	}
}
