// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"slices"
	"testing"
)

func TestParseBlocks(t *testing.T) {
	const old = `              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000002000000 0x0000000004000000 0x0000000004000000
                            4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000
`
	const today = `              Block Name    PSize              Offset               Used              Total` +
		`                HVA  RO
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
		"", "no table", "Block Name\n", "Block Name\nx 4 KiB 0x1", "Block Name\nx 4 QiB 0x1 0x2 0x2",
		"Block Name\nx 4 KiB 0x1 0x3 0x2", "Block Name\nx y KiB 0x1 0x2 0x2", "Block Name\nx 4 KiB 0x1 0xz 0x2",
		"Block Name\nx 4 KiB 0x1 0x0 0x2",
	} {
		if got, err := parseBlocks(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}
