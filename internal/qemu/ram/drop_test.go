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
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// present counts the pages of a block that have content, according to the kernel.
func present(t *testing.T, vm *qemu.VM, b ram.Block) (n int) {
	t.Helper()
	pages, err := uffd.OpenPagemap(vm.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pages.Close()
	for at := b.Addr; ; n++ {
		if at, err = pages.Next(at, b.Addr+b.Size); err != nil {
			t.Fatal(err)
		}
		if at == b.Addr+b.Size {
			return n
		}
		at += 4096
	}
}

// TestDrop checks that Drop removes what QEMU put into its memory at its start, for each kind of memory.
func TestDrop(t *testing.T) {
	onDisk := filepath.Join(t.TempDir(), "ram")
	backend := func(kind string) []string {
		return []string{
			"-m", "64", "-object", "memory-backend-" + kind + ",id=ram0,size=64M,prealloc=on",
			"-machine", "memory-backend=ram0",
		}
	}
	for _, test := range []struct {
		name string
		args []string
	}{
		{"shared file", backend("file,share=on,mem-path=" + qemutest.RAMFile(t))},
		{"private file", backend("file,share=off,mem-path=" + filepath.Dir(qemutest.RAMFile(t)))},
		{"private file on a disk", backend("file,share=off,mem-path=" + onDisk)},
		{"ram", backend("ram")},
		{"ram, shared", backend("ram,share=on")},
		{"memfd", backend("memfd")},
		{"locked", append(backend("ram"), "-overcommit", "mem-lock=on")},
		{"locked, shared", append(backend("memfd"), "-overcommit", "mem-lock=on")},
		{"huge, shared", []string{
			"-m", "64", "-object", "memory-backend-memfd,id=ram0,size=64M,hugetlb=on,hugetlbsize=2M",
			"-machine", "memory-backend=ram0",
		}},
		{"huge, private", []string{
			"-m", "64", "-object", "memory-backend-memfd,share=off,id=ram0,size=64M,hugetlb=on,hugetlbsize=2M",
			"-machine", "memory-backend=ram0",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if strings.HasPrefix(test.name, "huge") {
				qemutest.HugePages(t, 40)
			}
			_, vm := qemutest.Start(t, append(test.args, "-S", "-incoming", "defer")...)
			blocks, err := vm.RAM.Blocks(qemutest.Context(t))
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(blocks, func(b ram.Block) bool { return b.ID == "ram0" })
			block := blocks[at]
			memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer memory.Close()
			if _, err := memory.WriteAt([]byte("junk"), int64(block.Addr)); err != nil {
				t.Fatal(err)
			}
			if present(t, vm, block) == 0 {
				t.Fatal("nothing is there to be dropped")
			}
			if want := strings.Contains(strings.Join(test.args, " "), "prealloc=on"); block.Populated != want {
				t.Errorf("populated: %t", block.Populated)
			}
			for range 2 {
				if err := vm.RAM.Drop(qemutest.Context(t), blocks); err != nil {
					t.Fatal(err)
				}
				if err := vm.RAM.CheckEmpty(blocks); err != nil {
					t.Error(err)
				}
				if n := present(t, vm, block); n != 0 {
					t.Errorf("%d pages are left", n)
				}
			}
			word := make([]byte, 4)
			if _, err := memory.ReadAt(word, int64(block.Addr)); err != nil || !bytes.Equal(word, make([]byte, 4)) {
				t.Errorf("it holds %q, %v", word, err)
			}
			if found, err := vm.RAM.Blocks(qemutest.Context(t)); err != nil || len(found) != len(blocks) {
				t.Errorf("afterwards there are %d of %d blocks: %v", len(found), len(blocks), err)
			}
			if _, err := memory.WriteAt([]byte("used"), int64(block.Addr)); err != nil {
				t.Fatal(err)
			}
			if err := vm.RAM.CheckEmpty(blocks); err == nil {
				t.Error("that a page is in use is not noticed")
			}
		})
	}
}

// TestDropInPieces checks that memory larger than dropPiece is dropped completely, up to the border of each piece.
func TestDropInPieces(t *testing.T) {
	for _, kind := range []string{"ram", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			_, vm := qemutest.Start(t, "-m", "2560", "-object", "memory-backend-"+kind+",id=ram0,size=2560M",
				"-machine", "memory-backend=ram0", "-S", "-incoming", "defer")
			blocks, err := vm.RAM.Blocks(qemutest.Context(t))
			if err != nil {
				t.Fatal(err)
			}
			block := blocks[slices.IndexFunc(blocks, func(b ram.Block) bool { return b.ID == "ram0" })]
			memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer memory.Close()
			const piece = ram.DropPiece
			for _, at := range []uint64{piece - 4096, piece, 2*piece - 4096, 2 * piece, block.Size - 4096} {
				if _, err := memory.WriteAt([]byte("junk"), int64(block.Addr+at)); err != nil {
					t.Fatal(err)
				}
			}
			if n := present(t, vm, block); n < 5 {
				t.Fatalf("%d pages are there to be dropped", n)
			}
			if err := vm.RAM.Drop(qemutest.Context(t), blocks); err != nil {
				t.Fatal(err)
			}
			if n := present(t, vm, block); n != 0 {
				t.Errorf("%d pages are left", n)
			}
		})
	}
}

// TestDropOfOthers checks that another VM's memory is never dropped, and that memory is never taken as empty while the
// content of a file shows through.
func TestDropOfOthers(t *testing.T) {
	path := qemutest.RAMFile(t)
	_, neighbour := qemutest.Start(t, append(qemutest.RAM(path), "-S")...)
	_, vm := qemutest.Start(t, append(qemutest.RAM(path), "-S", "-incoming", "defer")...)
	blocks, err := neighbour.RAM.Blocks(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b ram.Block) bool { return b.ID == "ram0" })
	qemutest.CheckBlock(t, neighbour, blocks[at]) // it has something to lose
	before := present(t, neighbour, blocks[at])
	blocks, err = vm.RAM.Blocks(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	var bad *ram.Error
	if err := vm.RAM.Drop(qemutest.Context(t), blocks); !errors.As(err, &bad) ||
		!strings.Contains(bad.Reason, fmt.Sprintf("process %d (qemu-system-x86) maps", neighbour.Pid)) {
		t.Errorf("error %v", err)
	}
	if blocks, err = neighbour.RAM.Blocks(qemutest.Context(t)); err != nil || present(t, neighbour, blocks[at]) != before {
		t.Errorf("the neighbour lost memory: %v", err)
	}

	// A privately mapped file no longer shows after Drop, and does not change.
	template := qemutest.RAMFile(t)
	if err := os.WriteFile(template, bytes.Repeat([]byte("snapshot"), 64<<20/8), 0o600); err != nil {
		t.Fatal(err)
	}
	private := func(path string) []string {
		return []string{
			"-m", "64", "-object", "memory-backend-file,id=ram0,size=64M,share=off,mem-path=" + path,
			"-machine", "memory-backend=ram0", "-S", "-incoming", "defer",
		}
	}
	_, vm = qemutest.Start(t, private(template)...)
	if blocks, err = vm.RAM.Blocks(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	if err := vm.RAM.Drop(qemutest.Context(t), blocks); err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", vm.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	page := make([]byte, 4096)
	if _, err := memory.ReadAt(page, int64(blocks[at].Addr)+1<<20); err != nil || !bytes.Equal(page, make([]byte, 4096)) {
		t.Errorf("the file shows through: %q, %v", page[:16], err)
	}
	if text, err := os.ReadFile(template); err != nil || !bytes.Equal(text[:8], []byte("snapshot")) {
		t.Errorf("the file was changed: %v", err)
	}
	// Where the file cannot be hidden, on hugetlbfs, a file with content is refused.
	huge := filepath.Join(qemutest.HugePages(t, 66), "snapshot")
	// What this QEMU preallocates stays in the file.
	_, first := qemutest.Start(t, "-m", "64", "-machine", "memory-backend=ram0", "-S",
		"-object", "memory-backend-file,id=ram0,size=64M,share=on,prealloc=on,mem-path="+huge)
	if err := first.Quit(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	_, vm = qemutest.Start(t, private(huge)...)
	if blocks, err = vm.RAM.Blocks(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	err = vm.RAM.Drop(qemutest.Context(t), blocks)
	if !errors.As(err, &bad) || !strings.Contains(bad.Reason, "has content") {
		t.Errorf("error %v", err)
	}
}
