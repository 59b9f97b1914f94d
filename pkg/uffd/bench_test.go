// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// BenchmarkCopy fills shared memory in order, as the sweep does. The time does not include discarding it again.
func BenchmarkCopy(b *testing.B) {
	for _, size := range []int{4 << 10, 512 << 10} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			c := uffdtest.Start(b)
			u := c.Supervise(0)
			r := c.Map(uffdtest.Shmem, 64<<20/4096)
			if _, err := u.Register(r, uffd.ModeMissing); err != nil {
				b.Fatal(err)
			}
			src := make([]byte, size)
			copy(src, uffdtest.Page(uffdtest.Shmem, 1))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			off := uint64(0)
			for b.Loop() {
				if off == r.Len {
					b.StopTimer()
					if v := c.Do(uffdtest.Punch(r)); v.Errno != 0 {
						b.Fatal(v)
					}
					off = 0
					b.StartTimer()
				}
				if n, err := u.Copy(r.Start+off, src, 0); err != nil {
					b.Fatal(n, err)
				}
				off += uint64(size)
			}
		})
	}
}

// BenchmarkRead reads the messages of 16 waiting threads, in one batch or one by one, and reports the time for
// all 16. The time does not include waking them so that they fault again.
func BenchmarkRead(b *testing.B) {
	const threads = 16
	for _, batch := range []int{1, threads} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			c := uffdtest.Start(b)
			u := c.Supervise(0)
			r := c.Map(uffdtest.Shmem, threads)
			if _, err := u.Register(r, uffd.ModeMissing); err != nil {
				b.Fatal(err)
			}
			var waiting []uffdtest.Pending
			for i := range uint64(threads) {
				waiting = append(waiting, c.Go(uffdtest.Read(r.Start+i*4096)))
			}
			for _, p := range waiting {
				p.WaitWaiting()
			}
			buf := uffd.NewEventBuffer(batch)
			b.ReportAllocs()
			for b.Loop() {
				for got := 0; got < threads; {
					n, err := u.Read(buf)
					if err != nil && !errors.Is(err, uffd.ErrWouldBlock) {
						b.Fatal(err)
					}
					got += n
				}
				b.StopTimer()
				if err := u.Wake(r); err != nil {
					b.Fatal(err)
				}
				for _, p := range waiting {
					p.WaitWaiting()
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkFault measures a whole fault without a network: a thread of another process touches a page, we read the
// message and copy the page, and the thread continues with the next page.
func BenchmarkFault(b *testing.B) {
	c := uffdtest.Start(b)
	u := c.Supervise(0)
	r := c.Map(uffdtest.Shmem, 4096)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		b.Fatal(err)
	}
	page := uffdtest.Page(uffdtest.Shmem, 1)
	buf := uffd.NewEventBuffer(16)
	fds := []unix.PollFd{{Fd: int32(u.FD()), Events: unix.POLLIN}}
	toucher := c.Go(uffdtest.Touch(r, uffdtest.Shmem))
	left := r.Len / 4096
	b.ReportAllocs()
	for b.Loop() {
		if left == 0 {
			b.StopTimer()
			toucher.JoinOK()
			c.Do(uffdtest.Punch(r))
			toucher, left = c.Go(uffdtest.Touch(r, uffdtest.Shmem)), r.Len/4096
			b.StartTimer()
		}
		for {
			if _, err := u.Read(buf); err == nil {
				break
			} else if !errors.Is(err, uffd.ErrWouldBlock) {
				b.Fatal(err)
			}
			if _, err := unix.Poll(fds, 10_000); err != nil && err != unix.EINTR {
				b.Fatal(err)
			}
		}
		if _, err := u.Copy(buf.At(0).Pagefault.Addr, page, 0); err != nil {
			b.Fatal(err)
		}
		left--
	}
	c.Kill()
}
