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

	"github.com/migrated-vm/migrated/pkg/pagesrv/pagemap"
)

// present says how many pages of a block have content, by the kernel's word.
func present(t *testing.T, vm *VM, b RAMBlock) (n int) {
	t.Helper()
	pages, err := pagemap.Open(vm.Pid)
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

// What QEMU has put into its memory when it starts is dropped, whatever that memory is.
func TestDropRAM(t *testing.T) {
	onDisk := filepath.Join(t.TempDir(), "ram")
	backend := func(kind string) []string {
		return []string{"-m", "64", "-object", "memory-backend-" + kind + ",id=ram0,size=64M,prealloc=on", "-machine", "memory-backend=ram0"}
	}
	for _, test := range []struct {
		name string
		args []string
	}{
		{"shared file", backend("file,share=on,mem-path=" + ramFile(t))},
		{"private file", backend("file,share=off,mem-path=" + filepath.Dir(ramFile(t)))},
		{"private file on a disk", backend("file,share=off,mem-path=" + onDisk)},
		{"ram", backend("ram")},
		{"ram, shared", backend("ram,share=on")},
		{"memfd", backend("memfd")},
		{"locked", append(backend("ram"), "-overcommit", "mem-lock=on")},
		{"locked, shared", append(backend("memfd"), "-overcommit", "mem-lock=on")},
		{"huge, shared", []string{"-m", "64", "-object", "memory-backend-memfd,id=ram0,size=64M,hugetlb=on,hugetlbsize=2M", "-machine", "memory-backend=ram0"}},
		{"huge, private", []string{"-m", "64", "-object", "memory-backend-memfd,share=off,id=ram0,size=64M,hugetlb=on,hugetlbsize=2M", "-machine", "memory-backend=ram0"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if strings.HasPrefix(test.name, "huge") {
				hugePages(t, 40)
			}
			_, vm := start(t, append(test.args, "-S", "-incoming", "defer")...)
			blocks, err := vm.RAMBlocks(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(blocks, func(b RAMBlock) bool { return b.ID == "ram0" })
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
				if err := vm.DropRAM(testContext(t), blocks); err != nil {
					t.Fatal(err)
				}
				if err := vm.CheckEmpty(blocks); err != nil {
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
			if found, err := vm.RAMBlocks(testContext(t)); err != nil || len(found) != len(blocks) {
				t.Errorf("afterwards there are %d of %d blocks: %v", len(found), len(blocks), err)
			}
			if _, err := memory.WriteAt([]byte("used"), int64(block.Addr)); err != nil {
				t.Fatal(err)
			}
			if err := vm.CheckEmpty(blocks); err == nil {
				t.Error("that a page is in use is not noticed")
			}
		})
	}
}

// The memory of another VM, or what a file holds that shows through, is never dropped nor taken for empty.
func TestDropRAMOfOthers(t *testing.T) {
	path := ramFile(t)
	_, neighbour := start(t, append(ram(path), "-S")...)
	_, vm := start(t, append(ram(path), "-S", "-incoming", "defer")...)
	blocks, err := neighbour.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b RAMBlock) bool { return b.ID == "ram0" })
	checkBlock(t, neighbour, blocks[at]) // it has something to lose
	before := present(t, neighbour, blocks[at])
	blocks, err = vm.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	var bad *RAMError
	if err := vm.DropRAM(testContext(t), blocks); !errors.As(err, &bad) || !strings.Contains(bad.Reason, fmt.Sprintf("process %d (qemu-system-x86) maps", neighbour.Pid)) {
		t.Errorf("error %v", err)
	}
	if blocks, err = neighbour.RAMBlocks(testContext(t)); err != nil || present(t, neighbour, blocks[at]) != before {
		t.Errorf("the neighbour lost memory: %v", err)
	}

	// Of a file that is mapped privately nothing is seen any more, and nothing is changed.
	template := ramFile(t)
	if err := os.WriteFile(template, bytes.Repeat([]byte("snapshot"), 64<<20/8), 0o600); err != nil {
		t.Fatal(err)
	}
	private := func(path string) []string {
		return []string{"-m", "64", "-object", "memory-backend-file,id=ram0,size=64M,share=off,mem-path=" + path, "-machine", "memory-backend=ram0", "-S", "-incoming", "defer"}
	}
	_, vm = start(t, private(template)...)
	if blocks, err = vm.RAMBlocks(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := vm.DropRAM(testContext(t), blocks); err != nil {
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
	// Where that cannot be had, a file with content is refused.
	huge := filepath.Join(hugePages(t, 66), "snapshot")
	_, first := start(t, "-m", "64", "-machine", "memory-backend=ram0", "-S", // and what it preallocates stays in the file
		"-object", "memory-backend-file,id=ram0,size=64M,share=on,prealloc=on,mem-path="+huge)
	if err := first.Quit(testContext(t)); err != nil {
		t.Fatal(err)
	}
	_, vm = start(t, private(huge)...)
	if blocks, err = vm.RAMBlocks(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := vm.DropRAM(testContext(t), blocks); !errors.As(err, &bad) || !strings.Contains(bad.Reason, "has content") {
		t.Errorf("error %v", err)
	}
}
