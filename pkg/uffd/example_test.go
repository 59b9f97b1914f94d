// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// touched returns the pages of memory, counted from 0, that this process touches while f runs. For another process,
// take its descriptor (package inject) and open the pagemap of its pid.
func touched(memory []byte, f func()) (pages []uint64, err error) {
	r := uffd.Range{Start: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))), Len: uint64(len(memory))}
	u, err := uffd.Open(uffd.OpenOptions{})
	if err != nil {
		return nil, err
	}
	defer u.Close() // which lifts the protection
	// With FeatureRWPAsync the kernel answers every fault itself. Without it, a Go program must not do this to itself.
	if _, _, err := u.API(uffd.FeatureRWP | uffd.FeatureRWPAsync); err != nil {
		return nil, err // a *NotSupportedError before Linux 7.3
	}
	if _, err := u.Register(r, uffd.ModeRWP); err != nil {
		return nil, err
	}
	p, err := uffd.OpenPagemap(os.Getpid())
	if err != nil {
		return nil, err
	}
	defer p.Close()

	if err := u.RWProtect(r, uffd.RWPProtect); err != nil {
		return nil, err
	}
	f()

	// The scan is complete when rest is empty, however many regions there are.
	q, regions := uffd.PageQuery{All: uffd.PageAccessed}, make([]uffd.PageRegion, 16)
	for rest := r; rest.Len > 0; {
		var n int
		if n, rest, err = p.Scan(rest, q, regions); err != nil {
			return nil, err
		}
		for _, found := range regions[:n] {
			for at := found.Start; at < found.End; at += 4096 {
				pages = append(pages, (at-r.Start)/4096)
			}
		}
	}
	return pages, nil
}

// The example finds the pages that are touched in an interval of time, without a message for each. It needs Linux 7.3.
func Example_workingSet() {
	memory, err := unix.Mmap(-1, 0, 64*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		fmt.Println(err)
		return
	}
	for i := range memory {
		memory[i] = 1
	}
	pages, err := touched(memory, func() {
		memory[5*4096], memory[40*4096] = 2, memory[6*4096]
	})
	fmt.Println(pages, err) // [5 6 40] <nil>
}
