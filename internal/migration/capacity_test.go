// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// smallTmpfs mounts a tmpfs of that size, and makes a file in it.
func smallTmpfs(t *testing.T, size string) (file string) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		testenv.CannotRun(t, "mounting needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	file = filepath.Join(dir, "ram")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestHostHasRoom(t *testing.T) {
	const mib = 1 << 20
	file := smallTmpfs(t, "32m")
	onTmpfs := []ram.Block{{ID: "ram", Size: 64 * mib, PageSize: 4096, Path: file, File: file, FileIdentity: "here"}}
	h := hostCapacity{
		memory:    func() (uint64, error) { return 100 * mib, nil },
		hugePages: func(uint64) (free, promised uint64, err error) { return 20 * mib, 12 * mib, nil },
	}
	block := func(pageSize, present uint64, file string) []*migratedv1.RamBlock {
		return []*migratedv1.RamBlock{{Id: "ram", Size: 64 * mib, PageSize: pageSize, Present: present, File: file}}
	}
	for name, c := range map[string]struct {
		machine *migratedv1.SourceMachine
		blocks  []ram.Block
		want    string // empty: it fits
	}{
		"fits on the tmpfs": {&migratedv1.SourceMachine{RamBlocks: block(4096, 30*mib, "f")}, onTmpfs, ""},
		"too much for the tmpfs": {
			&migratedv1.SourceMachine{RamBlocks: block(4096, 40*mib, "f")}, onTmpfs,
			"the VM uses 40 MiB, and 32 MiB are left on the file system of " + file,
		},
		"private at the source": {
			&migratedv1.SourceMachine{RamBlocks: block(4096, 0, ""), PrivateMemory: 40 * mib},
			onTmpfs, "the VM uses 40 MiB, and 32 MiB",
		},
		"fits into memory": {&migratedv1.SourceMachine{RamBlocks: block(4096, 0, ""), PrivateMemory: 100 * mib}, nil, ""},
		"too much for memory": {
			&migratedv1.SourceMachine{RamBlocks: block(4096, 61*mib, "f"), PrivateMemory: 40 * mib}, nil,
			"the VM uses 101 MiB, and 100 MiB of memory and swap are available",
		},
		"fits into huge pages": {&migratedv1.SourceMachine{RamBlocks: block(2*mib, 0, "f"), HugeMemory: 20 * mib}, nil, ""},
		"too few huge pages": {
			&migratedv1.SourceMachine{RamBlocks: block(2*mib, 0, "f"), HugeMemory: 64 * mib}, nil,
			"the VM uses 64 MiB of huge pages, and 20 MiB are free",
		},
		"an older source": {&migratedv1.SourceMachine{RamBlocks: block(4096, 0, "f")}, onTmpfs, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := h.checkFits(c.machine, c.blocks)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, errNotOnHost) || !strings.Contains(err.Error(), c.want) || Remedy(err) == "" {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	failed := errors.New("QEMU cannot allocate memory")
	err := h.explainFailedStart(failed, &migratedv1.SourceMachine{RamBlocks: block(2*mib, 0, "f")})
	const want = "it needs 64 MiB of huge pages, and 8 MiB are free and not promised to others"
	if !errors.Is(err, failed) || !strings.Contains(err.Error(), want) ||
		!strings.Contains(Remedy(err), "hugepages-2048kB/nr_hugepages") {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestThisHost reads the kernel's real files.
func TestThisHost(t *testing.T) {
	memory, err := thisHost.memory()
	if err != nil || memory == 0 {
		t.Errorf("%d bytes of memory: %v", memory, err)
	}
	if _, _, err := thisHost.hugePages(2 << 20); err != nil {
		t.Error(err)
	}
}
