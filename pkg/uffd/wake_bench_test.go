// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// BenchmarkWakeAmongWaiters measures UFFDIO_WAKE of a page that no thread waits for, while that many threads wait for
// other pages. The kernel holds the descriptor's lock during the call (wake_userfault in fs/userfaultfd.c). Every
// UFFDIO_COPY does the same. So this is the part of a fault that cannot run in parallel on one descriptor, however many
// CPUs there are.
func BenchmarkWakeAmongWaiters(b *testing.B) {
	for _, threads := range []uint64{0, 1, 2, 4, 8, 16, 32, 64, 128} {
		b.Run(fmt.Sprint(threads), func(b *testing.B) {
			c := uffdtest.Start(b)
			u := c.NewUFFD(uffd.OpenSyscall)
			if _, _, err := u.API(0); err != nil {
				b.Fatal(err)
			}
			r := c.Map(uffdtest.Shmem, threads+1)
			if _, err := u.Register(r, uffd.ModeMissing); err != nil {
				b.Fatal(err)
			}
			for i := range threads {
				c.Go(uffdtest.Read(r.Start + i*4096)).WaitWaiting()
			}
			buf := uffd.NewEventBuffer(64)
			for read := 0; read < int(threads); { // threads whose fault was read wait in another queue, with the same lock
				n, err := u.Read(buf)
				if err != nil {
					b.Fatal(err)
				}
				read += n
			}
			nobody := uffd.Range{Start: r.Start + threads*4096, Len: 4096}
			for b.Loop() {
				if err := u.Wake(nobody); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			c.Kill()
		})
	}
}
