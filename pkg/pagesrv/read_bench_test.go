// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkReadRAM compares two ways to read RAM: pread(2) into a leased buffer, and copying from a mapping that is
// touched for the first time, because each page is served once. Reading a hole through the mapping makes the kernel
// allocate it, so the benchmark makes a new file after each pass.
func BenchmarkReadRAM(b *testing.B) {
	const size = 256 << 20
	for _, content := range []string{"data", "holes"} {
		for _, run := range []int{4 << 10, 512 << 10} {
			b.Run(fmt.Sprintf("pread/%s/%dKiB", content, run>>10), func(b *testing.B) {
				f := benchFile(b, size, content == "data")
				buf := make([]byte, run)
				order := rand.Perm(size / run)
				b.SetBytes(int64(run))
				for i := 0; b.Loop(); i++ {
					if _, err := f.ReadAt(buf, int64(order[i%len(order)])*int64(run)); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run(fmt.Sprintf("mapping/%s/%dKiB", content, run>>10), func(b *testing.B) {
				f := benchFile(b, size, content == "data")
				memory := benchMap(b, f, size)
				buf := make([]byte, run)
				order := rand.Perm(size / run)
				b.SetBytes(int64(run))
				for i := 0; b.Loop(); i++ {
					if i > 0 && i%len(order) == 0 {
						b.StopTimer()
						if err := unix.Munmap(memory); err != nil {
							b.Fatal(err)
						}
						if content == "holes" {
							f = benchFile(b, size, false)
						}
						memory = benchMap(b, f, size)
						b.StartTimer()
					}
					at := order[i%len(order)] * run
					copy(buf, memory[at:at+run]) // gRPC needs the bytes for longer than the mapping may live
				}
				_ = unix.Munmap(memory)
			})
		}
	}
}

func benchFile(b *testing.B, size int64, data bool) *os.File {
	f, err := os.CreateTemp("/dev/shm", "pagesrv-bench-")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = os.Remove(f.Name()) }()
	b.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		b.Fatal(err)
	}
	if data {
		chunk := make([]byte, 1<<20)
		for i := range chunk {
			chunk[i] = byte(i) | 1
		}
		for at := int64(0); at < size; at += int64(len(chunk)) {
			if _, err := f.WriteAt(chunk, at); err != nil {
				b.Fatal(err)
			}
		}
	}
	return f
}

func benchMap(b *testing.B, f *os.File, size int) []byte {
	memory, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		b.Fatal(err)
	}
	return memory
}
