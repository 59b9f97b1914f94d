// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestMatchMachine(t *testing.T) {
	const mib = 1 << 20
	source := &migratedv1.SourceMachine{
		MachineType: "pc-q35-7.2",
		RamBlocks: []*migratedv1.RamBlock{
			{Id: "ram0", Size: 64 * mib, PageSize: 4096, File: "s:0"},
			{Id: "ram1", Size: 32 * mib, PageSize: 2 * mib, File: "s:1"},
		},
	}
	good := func() *qemu.Facts {
		return &qemu.Facts{
			MachineType: "pc-q35-7.2",
			RAMBlocks: []ram.Block{ // in an order of its own
				{ID: "ram1", Size: 32 * mib, PageSize: 2 * mib, FileIdentity: "d:1"},
				{ID: "ram0", Size: 64 * mib, PageSize: 4096, FileIdentity: "d:0"},
			},
		}
	}
	for _, c := range []struct {
		name   string
		change func(*qemu.Facts)
		want   string // in the error; empty: none
	}{
		{"equal", func(*qemu.Facts) {}, ""},
		{"machine type", func(f *qemu.Facts) { f.MachineType = "pc-q35-7.1" }, "machine types differ"},
		{"RAM size", func(f *qemu.Facts) { f.RAMBlocks[1].Size *= 2 }, "RAM sizes differ"},
		{"page size", func(f *qemu.Facts) { f.RAMBlocks[0].PageSize = 4096 }, "page sizes differ"},
		{"missing block", func(f *qemu.Facts) { f.RAMBlocks = f.RAMBlocks[:1] }, `no RAM "ram0"`},
		{"extra block", func(f *qemu.Facts) {
			f.RAMBlocks = append(f.RAMBlocks, ram.Block{ID: "ram2"})
		}, `"ram2" that the source has not`},
		{"read-only on one host", func(f *qemu.Facts) { f.RAMBlocks[0].ReadOnly = true }, "read-only on one host alone"},
		{"the source's own file", func(f *qemu.Facts) { f.RAMBlocks[1].FileIdentity = "s:0" }, "very file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			facts := good()
			c.change(facts)
			blocks, err := matchMachine(source, facts)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("error is %v, want one with %q", err, c.want)
				}
				var remedied *remediedError
				if c.name != "extra block" && !errors.As(err, &remedied) {
					t.Errorf("error %v does not say what to do", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(blocks) != 2 || blocks[0].ID != "ram0" || blocks[1].ID != "ram1" {
				t.Errorf("blocks are %v, want the source's order", blocks)
			}
		})
	}
}

// Memory that QEMU cannot write to is not moved, and has to be the same on both hosts.
func TestMatchReadOnlyImage(t *testing.T) {
	block := func(content string) ram.Block {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, []byte("----"+content), 0o600); err != nil {
			t.Fatal(err)
		}
		return ram.Block{
			ID: "nv", Size: uint64(len(content)), PageSize: 4096, ReadOnly: true, Path: path, FileOffset: 4, File: path,
		}
	}
	ram0 := ram.Block{ID: "ram0", Size: 4096, PageSize: 4096}
	source, err := machineOf(&qemu.Facts{RAMBlocks: []ram.Block{block("image"), ram0}}, nil, "/qmp")
	if err != nil {
		t.Fatal(err)
	}
	if len(source.GetRamBlocks()) != 1 || len(source.GetReadOnlyBlocks()) != 1 {
		t.Fatalf("machine %v", source)
	}
	blocks, err := matchMachine(source, &qemu.Facts{RAMBlocks: []ram.Block{block("image"), ram0}})
	if err != nil || len(blocks) != 1 || blocks[0].ID != "ram0" {
		t.Errorf("blocks %v, %v", blocks, err)
	}
	if _, err := matchMachine(source, &qemu.Facts{
		RAMBlocks: []ram.Block{block("other"), ram0},
	}); err == nil || Remedy(err) == "" {
		t.Errorf("another image: %v", err)
	}
	if _, err := matchMachine(source, &qemu.Facts{RAMBlocks: []ram.Block{ram0}}); err == nil || Remedy(err) == "" {
		t.Errorf("no image: %v", err)
	}
}
