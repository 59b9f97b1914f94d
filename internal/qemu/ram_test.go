// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/cannot"
)

// checkBlock writes to the block's file and reads it back at its address in QEMU.
func checkBlock(t *testing.T, vm *VM, b RAMBlock) {
	t.Helper()
	file, err := os.OpenFile(b.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	mapped, err := unix.Mmap(int(file.Fd()), b.FileOffset, int(b.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(mapped); err != nil {
			t.Error(err)
		}
	}()
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", vm.Pid))
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	defer memory.Close()
	for _, offset := range []uint64{b.Size / 2, b.Size - b.PageSize} {
		mark := []byte(fmt.Sprintf("mark of %s at %d", b.ID, offset))
		copy(mapped[offset:], mark)
		got := make([]byte, len(mark))
		if _, err := memory.ReadAt(got, int64(b.Addr+offset)); err != nil || !bytes.Equal(got, mark) {
			t.Errorf("block %+v at offset %d: %q, %v", b, offset, got, err)
		}
	}
}

// checkFirstPages writes to the guest's memory where a block that begins at address 0 is said to be, and has QEMU read
// it.
func checkFirstPages(t *testing.T, vm *VM, b RAMBlock) {
	t.Helper()
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid), os.O_RDWR, 0)
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	defer memory.Close()
	for _, offset := range []uint64{0x10000, b.Size - b.PageSize} {
		mark := []byte(fmt.Sprintf("mark of %s at %d", b.ID, offset))
		if _, err := memory.WriteAt(mark, int64(b.Addr+offset)); err != nil {
			t.Fatal(err)
		}
		dump := filepath.Join(t.TempDir(), "dump")
		args := map[string]any{"val": offset, "size": len(mark), "filename": dump}
		if err := vm.QMP.Do(testContext(t), "pmemsave", args, nil); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(dump); err != nil || !bytes.Equal(got, mark) {
			t.Errorf("block %+v at offset %d: %q, %v", b, offset, got, err)
		}
	}
}

func TestRAMBlocks(t *testing.T) {
	named, gone, two, private := ramFile(t), ramFile(t), ramFile(t), ramFile(t)
	dir := filepath.Dir(named)
	backend := func(kind string) []string {
		return []string{"-m", "64", "-object", "memory-backend-" + kind + ",id=ram0,size=64M", "-machine", "memory-backend=ram0"}
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
		{"named file", ram(named), []string{"ram0"}, false},
		{"directory", ram(dir), []string{"ram0"}, false},
		{"removed file", ram(gone), []string{"ram0"}, false},
		{"file, private", backend("file,share=off,mem-path=" + private), []string{"ram0"}, true},
		{"file on a disk, private", backend("file,share=off,mem-path=" + filepath.Join(t.TempDir(), "ram")), []string{"ram0"}, true},
		{"ram", backend("ram"), []string{"ram0"}, true},
		{"ram, shared", backend("ram,share=on"), []string{"ram0"}, false},
		{"memfd", backend("memfd"), []string{"ram0"}, false},
		{"memfd, private", backend("memfd,share=off"), []string{"ram0"}, true},
		{"two nodes", nodes("file,share=on,mem-path="+two+"a", "file,share=on,mem-path="+two+"b"), []string{"b", "a"}, false},
		{"two nodes in one directory", nodes("file,share=on,mem-path="+dir, "file,share=on,mem-path="+dir), []string{"b", "a"}, false},
		{"two nodes of memfd", nodes("memfd", "memfd"), []string{"b", "a"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := start(t, append(test.args, "-S")...)
			if test.name == "removed file" {
				if err := os.Remove(gone); err != nil {
					t.Fatal(err)
				}
			}
			blocks, err := vm.RAMBlocks(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			byID := map[string]RAMBlock{}
			for _, b := range blocks {
				byID[b.ID] = b
				if b.PageSize != uint64(os.Getpagesize()) || b.Size%b.PageSize != 0 {
					t.Errorf("block %+v", b)
				}
			}
			for i, id := range test.want {
				b := byID[id]
				if b.Size != 64<<20/uint64(len(test.want)) || b.Private != test.private || !b.IsBackend() || b.HoldsFirstPage != (i == 0) {
					t.Errorf("block %+v", b)
				}
				if b.Path != "" && !b.Private {
					checkBlock(t, vm, b)
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

// Blocks that are not mapped into the guest are found as well: what cards boot from, ACPI's tables, video memory.
func TestRAMBlocksOfDevices(t *testing.T) {
	_, vm := start(t, "-m", "64", "-device", "VGA", "-device", "virtio-net-pci,addr=5", "-S")
	blocks, err := vm.RAMBlocks(testContext(t))
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
	if !slices.ContainsFunc(ids, func(id string) bool { return strings.HasSuffix(id, "/vga.vram") }) || !slices.IsSorted(ids) {
		t.Errorf("blocks %q", ids)
	}
}

func TestParseBlocks(t *testing.T) {
	const old = `              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000002000000 0x0000000004000000 0x0000000004000000
                            4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000
`
	const today = `              Block Name    PSize              Offset               Used              Total                HVA  RO
                    ram0    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000008000000 0x00007f9a2be00000  rw
`
	for text, want := range map[string][]listedBlock{
		old: {
			{name: "pc.ram", pageSize: 4096, offset: 0x2000000, used: 0x4000000, max: 0x4000000},
			{pageSize: 4096, used: 0x2000000, max: 0x2000000},
		},
		today: {{name: "ram0", pageSize: 2 << 20, used: 0x4000000, max: 0x8000000, addr: 0x7f9a2be00000}},
	} {
		got, err := parseBlocks(text)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	for _, text := range []string{
		"", "no table", "Block Name\n", "Block Name\nx 4 KiB 0x1", "Block Name\nx 4 QiB 0x1 0x2 0x2", "Block Name\nx 4 KiB 0x1 0x3 0x2",
		"Block Name\nx y KiB 0x1 0x2 0x2", "Block Name\nx 4 KiB 0x1 0xz 0x2", "Block Name\nx 4 KiB 0x1 0x0 0x2",
	} {
		if got, err := parseBlocks(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func TestHugePages(t *testing.T) {
	dir := hugePages(t, 32)
	_, vm := start(t, append(ram(dir), "-S")...)
	blocks, err := vm.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b RAMBlock) bool { return b.ID == "ram0" })
	if b := blocks[at]; b.PageSize != 2<<20 || b.Private {
		t.Errorf("block %+v", b)
	}
	checkBlock(t, vm, blocks[at])
}

func TestRAMThatCannotMove(t *testing.T) {
	_, vm := start(t, append(ram(filepath.Join(t.TempDir(), "ram")), "-S")...)
	_, err := vm.RAMBlocks(testContext(t))
	var bad *RAMError
	if err == nil {
		cannot.Run(t, "temporary files are on tmpfs here")
	}
	if !errors.As(err, &bad) || !strings.Contains(bad.Reason, "tmpfs") || bad.Remedy == "" {
		t.Errorf("error %v", err)
	}
}

// Memory that was plugged in is memory like any: whether the destination has it shows when they are compared.
func TestPluggedMemory(t *testing.T) {
	path, dimm := ramFile(t), ramFile(t)
	_, vm := start(t, append(ram(path), "-m", "64,slots=2,maxmem=1G")...)
	ctx := testContext(t)
	object := map[string]any{"qom-type": "memory-backend-file", "id": "extra", "size": 128 << 20, "share": true, "mem-path": dimm}
	device := map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "extra"}
	if err := vm.QMP.Do(ctx, "object-add", object, nil); err != nil {
		t.Fatal(err)
	}
	count := func() int {
		t.Helper()
		blocks, err := vm.RAMBlocks(ctx)
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

// A read-only image is left alone.
func TestReadOnlyImage(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, bytes.Repeat([]byte("image "), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	_, vm := start(t, "-m", "64,slots=2,maxmem=1G", "-machine", "nvdimm=on", "-S", "-incoming", "defer",
		"-object", "memory-backend-file,id=nv,size=8M,share=on,readonly=on,mem-path="+image, "-device", "nvdimm,memdev=nv,unarmed=on")
	blocks, err := vm.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b RAMBlock) bool { return b.ID == "nv" })
	if at < 0 || !blocks[at].ReadOnly || blocks[at].Size != 8<<20 {
		t.Fatalf("blocks %+v", blocks)
	}
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.DropRAM(testContext(t), blocks); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(image); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image was changed: %v", err)
	}
}

func TestParseVMA(t *testing.T) {
	for line, want := range map[string]vma{
		"7f78f7fff000-7f78fbfff000 rw-s 00001000 00:1b 15                         /dev/shm/a b (deleted)": {
			start: 0x7f78f7fff000, end: 0x7f78fbfff000, writable: true, shared: true, offset: 0x1000, minor: 0x1b, inode: 15, path: "/dev/shm/a b (deleted)"},
		"1000-2000 r-xp 00000000 fd:01 77 /bin/x": {start: 0x1000, end: 0x2000, major: 0xfd, minor: 1, inode: 77, path: "/bin/x"},
		"1000-2000 rw-p 00000000 00:00 0 ":        {start: 0x1000, end: 0x2000, writable: true},
	} {
		if got, err := parseVMA(line); err != nil || got != want {
			t.Errorf("%q: %+v, %v", line, got, err)
		}
	}
	if _, err := parseVMA("1000-2000 rw-p"); err == nil {
		t.Error("half a line is accepted")
	}
}
