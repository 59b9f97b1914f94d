// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// blockStruct returns a struct RAMBlock as it is on the heap of QEMU before 8.1.
func blockStruct(host, offset, used, most uint64, name string) []byte {
	b := make([]byte, 400)
	for at, value := range map[int]uint64{
		8: 0x7fff1234, blockHost: host, blockOffset: offset, blockOffset + 8: used, blockOffset + 16: most,
	} {
		binary.LittleEndian.PutUint64(b[at:], value)
	}
	copy(b[blockName:], name)
	return b
}

// TestHeapSearch checks that a match must have all values that QEMU reported, and must be the only one.
func TestHeapSearch(t *testing.T) {
	good := blockStruct(0x7f0000000000, 0, 64<<20, 64<<20, "pc.ram")
	for name, c := range map[string]struct {
		heap [][]byte
		want string // in the error; empty: the block is found
	}{
		"found":          {[][]byte{make([]byte, 160), good}, ""},
		"not there":      {[][]byte{make([]byte, 800)}, "not found"},
		"another name":   {[][]byte{blockStruct(1<<40, 0, 64<<20, 64<<20, "pc.ram2")}, "not found"},
		"another size":   {[][]byte{blockStruct(1<<40, 0, 32<<20, 64<<20, "pc.ram")}, "not found"},
		"another offset": {[][]byte{blockStruct(1<<40, 4096, 64<<20, 64<<20, "pc.ram")}, "not found"},
		"junk behind":    {[][]byte{append(bytes.Clone(good[:blockName+10]), bytes.Repeat([]byte{7}, 390)...)}, "not found"},
		"the same twice": {[][]byte{good, good}, ""},
		"two places":     {[][]byte{good, blockStruct(1<<40, 0, 64<<20, 64<<20, "pc.ram")}, "two places"},
		"across a chunk": {[][]byte{make([]byte, heapChunk-160), good, make([]byte, 4096)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			heap := bytes.Join(c.heap, nil)
			blocks := []listedBlock{{name: "pc.ram", used: 64 << 20, max: 64 << 20}, {name: "", used: 1, max: 1}}
			w := wanted(blocks)
			h := heapSearch{structs: map[uint64]uint64{}}
			err := h.search(bytes.NewReader(heap), process.Mapping{End: uint64(len(heap))}, w)
			switch missing := w.missing(); {
			case c.want == "" && (err != nil || missing != nil || blocks[0].addr != 0x7f0000000000):
				t.Errorf("blocks %+v, %v", blocks, err)
			case c.want == "not found" && (err != nil || missing == nil):
				t.Errorf("blocks %+v, %v", blocks, err)
			case c.want == "two places" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("blocks %+v, %v", blocks, err)
			}
			if c.want != "" {
				return
			}
			blocks[0].addr = 0 // and once more, from the place where it was found
			if err := h.again(bytes.NewReader(heap), wanted(blocks)); err != nil || blocks[0].addr != 0x7f0000000000 {
				t.Errorf("again: blocks %+v, %v", blocks, err)
			}
		})
	}
}
