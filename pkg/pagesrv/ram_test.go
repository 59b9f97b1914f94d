// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestOpenRAMRefusesWhatItCannotServe(t *testing.T) {
	file := ramFile(t, 1<<20, func(int64) []byte { return nil }).Name()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	good := Block{ID: "good", Path: file, Size: 1 << 20, PageSize: 4096}
	for _, test := range []struct {
		name string
		edit func(*Block)
		text string
	}{
		{"no file", func(b *Block) { b.Path += "-missing" }, "no such file"},
		{"FIFO", func(b *Block) { b.Path = fifo }, "no regular file"},
		{"directory", func(b *Block) { b.Path = "/dev/shm" }, "no regular file"},
		{"file too short", func(b *Block) { b.Size += 4096 }, "the block ends at 1052672"},
		{"file too short behind offset", func(b *Block) { b.Offset = 4096 }, "the block ends at"},
		{"negative offset", func(b *Block) { b.Offset = -4096 }, "offset -4096"},
		{"size that overflows", func(b *Block) { b.Size = 1 << 63 }, "no part of a file"},
		{"no size", func(b *Block) { b.Size = 0 }, "multiple"},
		{"part of a page", func(b *Block) { b.Size = 4095 }, "multiple"},
		{"page size", func(b *Block) { b.PageSize = 12288 }, "power of two"},
		{"gigantic page", func(b *Block) { b.PageSize = 1 << 30; b.Size = 1 << 30 }, "LargestPage is 2097152"},
	} {
		t.Run(test.name, func(t *testing.T) {
			bad := good
			bad.ID = "bad"
			test.edit(&bad)
			_, err := OpenRAM([]Block{good, bad})
			if err == nil || !strings.Contains(err.Error(), `"bad"`) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v, want an error about %q", err, test.text)
			}
		})
	}
	if _, err := OpenRAM([]Block{
		{ID: "gone", Path: file + "-missing", Size: 4096, PageSize: 4096},
	}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("untyped: %v", err)
	}
	if _, err := OpenRAM(nil); err == nil {
		t.Error("a VM without RAM was opened")
	}
}

// TestDeletedFileIsServed: the file of another process can be opened by way of /proc, also if it has no name any more.
func TestDeletedFileIsServed(t *testing.T) {
	f := ramFile(t, 1<<20, pattern)
	if err := unix.Unlink(f.Name()); err != nil {
		t.Fatal(err)
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	ram := openRAM(t, Block{ID: "ram", Path: mapFile(t, memory), Size: 1 << 20, PageSize: 4096})
	page := make([]byte, 4096)
	if err := ram.blocks[0].read(page, 7*4096); err != nil || !bytes.Equal(page, pattern(7)) {
		t.Errorf("read through /proc: %v", err)
	}
}

func TestIsZeroSeesEveryByte(t *testing.T) {
	page := make([]byte, 64<<10)
	rapid.Check(t, func(t *rapid.T) {
		size := 4096 << rapid.IntRange(0, 4).Draw(t, "size")
		at := rapid.IntRange(0, size-1).Draw(t, "at")
		if !isZero(page[:size]) {
			t.Fatal("a zero page is taken for data")
		}
		page[at] = rapid.ByteMin(1).Draw(t, "value")
		zero := isZero(page[:size])
		page[at] = 0
		if zero {
			t.Fatal("data is taken for a zero page")
		}
	})
}
