// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

func TestRAMBlocks(t *testing.T) {
	named := ramFile(t)
	dir := filepath.Dir(ramFile(t))
	two := ramFile(t)
	gone := ramFile(t)
	for _, test := range []struct {
		name string
		args []string
		want []string // ids
	}{
		{"named file", ram(named), []string{"ram0"}},
		{"directory", ram(dir), []string{"ram0"}},
		{"removed file", ram(gone), []string{"ram0"}},
		{"two nodes", []string{"-m", "64", "-smp", "2",
			"-object", "memory-backend-file,id=b,size=32M,share=on,mem-path=" + two + "b", "-numa", "node,nodeid=0,cpus=0,memdev=b",
			"-object", "memory-backend-file,id=a,size=32M,share=on,mem-path=" + two + "a", "-numa", "node,nodeid=1,cpus=1,memdev=a"},
			[]string{"a", "b"}},
		{"two nodes in one directory", []string{"-m", "64", "-smp", "2",
			"-object", "memory-backend-file,id=b,size=32M,share=on,mem-path=" + dir, "-numa", "node,nodeid=0,cpus=0,memdev=b",
			"-object", "memory-backend-file,id=a,size=32M,share=on,mem-path=" + dir, "-numa", "node,nodeid=1,cpus=1,memdev=a"},
			[]string{"a", "b"}},
		{"memfd of QEMU 7.2", []string{"-m", "64", "-object", "memory-backend-memfd,id=m,size=64M", "-machine", "memory-backend=m"}, []string{"m"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := start(t, append(test.args, "-S")...)
			if test.name == "removed file" {
				if err := os.Remove(gone); err != nil {
					t.Fatal(err)
				}
			}
			blocks, err := vm.RAMBlocks(testContext(t))
			v := vm.QMP.Version()
			if test.want[0] == "m" && (v.Major > 8 || v.Major == 8 && v.Minor > 0) {
				if err == nil {
					t.Error("memfd is accepted")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			for _, b := range blocks {
				ids = append(ids, b.ID)
				if b.PageSize != uint64(os.Getpagesize()) || b.Size != 64<<20/uint64(len(test.want)) {
					t.Errorf("block %+v", b)
				}
				checkBlock(t, vm, b)
			}
			if fmt.Sprint(ids) != fmt.Sprint(test.want) {
				t.Errorf("blocks %v, want %v", ids, test.want)
			}
			if len(blocks) == 2 && blocks[0].FileIdentity == blocks[1].FileIdentity {
				t.Error("two files have one identity")
			}
		})
	}
}

func TestHugePages(t *testing.T) {
	dir := hugePages(t, 32)
	_, vm := start(t, append(ram(dir), "-S")...)
	blocks, err := vm.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if b := blocks[0]; b.PageSize != 2<<20 {
		t.Errorf("block %+v", b)
	}
	checkBlock(t, vm, blocks[0])
	checkPunch(t, blocks[0])
}

func TestPunchRAM(t *testing.T) {
	_, vm := start(t, append(ram(ramFile(t)), "-S", "-incoming", "defer")...)
	blocks, err := vm.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	checkPunch(t, blocks[0])
}

// checkPunch fills a block and empties it.
func checkPunch(t *testing.T, b RAMBlock) {
	t.Helper()
	f, err := os.OpenFile(b.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(b.Size)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := PunchRAM(b); err != nil {
			t.Fatal(err)
		}
		if st, err := fstat(int(f.Fd())); err != nil || st.Blocks != 0 || st.Size != int64(b.Size) {
			t.Errorf("%d blocks, size %d, %v", st.Blocks, st.Size, err)
		}
	}
}

func TestRAMThatCannotMove(t *testing.T) {
	onDisk := filepath.Join(t.TempDir(), "ram")
	path := ramFile(t)
	for _, test := range []struct {
		name, reason string
		args         []string
	}{
		{"default", "memory-backend-ram", []string{"-m", "64"}},
		{"private", "share=off", []string{"-m", "64", "-object", "memory-backend-file,id=ram0,size=64M,mem-path=" + path, "-machine", "memory-backend=ram0"}},
		{"on a disk", "tmpfs", ram(onDisk)},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := start(t, append(test.args, "-S")...)
			_, err := vm.RAMBlocks(testContext(t))
			var bad *RAMError
			if test.name == "on a disk" && err == nil {
				cannot.Run(t, "temporary files are on tmpfs here")
			}
			if !errors.As(err, &bad) || !strings.Contains(bad.Reason, test.reason) || bad.Remedy == "" {
				t.Errorf("error %v, want %q in it", err, test.reason)
			}
		})
	}
}

func TestPluggedMemory(t *testing.T) {
	path, dimm := ramFile(t), ramFile(t)
	_, vm := start(t, append(ram(path), "-m", "64,slots=2,maxmem=1G")...)
	ctx := testContext(t)
	object := map[string]any{"qom-type": "memory-backend-file", "id": "extra", "size": 128 << 20, "share": true, "mem-path": dimm}
	device := map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "extra"}
	if err := errors.Join(vm.QMP.Do(ctx, "object-add", object, nil), vm.QMP.Do(ctx, "device_add", device, nil)); err != nil {
		t.Fatal(err)
	}
	_, err := vm.RAMBlocks(ctx)
	var bad *RAMError
	if !errors.As(err, &bad) || bad.ID != "extra" || !strings.Contains(bad.Reason, "dimm1") {
		t.Errorf("error %v", err)
	}
}

func TestParseVMA(t *testing.T) {
	for line, want := range map[string]vma{
		"7f78f7fff000-7f78fbfff000 rw-s 00001000 00:1b 15                         /dev/shm/a b (deleted)": {
			start: 0x7f78f7fff000, end: 0x7f78fbfff000, shared: true, offset: 0x1000, minor: 0x1b, inode: 15, path: "/dev/shm/a b (deleted)"},
		"1000-2000 r-xp 00000000 fd:01 77 /bin/x": {start: 0x1000, end: 0x2000, major: 0xfd, minor: 1, inode: 77, path: "/bin/x"},
		"1000-2000 rw-p 00000000 00:00 0 ":        {start: 0x1000, end: 0x2000},
	} {
		if got, err := parseVMA(line); err != nil || got != want {
			t.Errorf("%q: %+v, %v", line, got, err)
		}
	}
	if _, err := parseVMA("1000-2000 rw-p"); err == nil {
		t.Error("half a line is accepted")
	}
}
