// SPDX-License-Identifier: Apache-2.0

package load

import (
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

const (
	churnUse  = time.Second
	churnFree = 3 * time.Second // the kernel reports free pages to a balloon after two
)

// churn takes memory from the kernel, uses it, checks it and gives it back. So a guest with a balloon discards pages,
// and uses them again, while it moves.
type churn struct {
	rounds, corruptions atomic.Uint64
}

func (c *churn) run(l *Load) {
	for generation := uint32(firstGeneration); ; generation++ {
		memory, err := mapMemory(l.config.Churn)
		if err != nil {
			panic(err) // the test gives the guest enough
		}
		pages := unsafe.Slice((*stamp.Page)(unsafe.Pointer(&memory[0])), len(memory)/stamp.PageSize)
		for i := range pages {
			if pages[i] != (stamp.Page{}) { // the kernel has cleared it
				l.report(&c.corruptions, stamp.Damage{Page: uint32(i), Word: 0, Got: pages[i][0], Kind: stamp.Unknown})
			}
			pages[i].Write(l.config.Fill, uint32(i), generation)
		}
		for range 2 {
			time.Sleep(churnUse / 2)
			for i := range pages {
				if first := pages[i].Check(l.config.Fill, uint32(i), generation); first >= 0 {
					l.report(&c.corruptions, pages[i].Explain(l.config.Fill, uint32(i), generation, first))
				}
			}
		}
		if err := unix.Munmap(memory); err != nil {
			panic(err) // it is mapped
		}
		c.rounds.Add(1)
		time.Sleep(churnFree)
	}
}
