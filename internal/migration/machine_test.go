// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
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
			RAMBlocks: []qemu.RAMBlock{ // in an order of its own
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
		{"missing block", func(f *qemu.Facts) { f.RAMBlocks = f.RAMBlocks[:1] }, `no memory backend "ram0"`},
		{"extra block", func(f *qemu.Facts) {
			f.RAMBlocks = append(f.RAMBlocks, qemu.RAMBlock{ID: "ram2"})
		}, `"ram2" that the source has not`},
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
