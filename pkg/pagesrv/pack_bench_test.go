// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/stamp"
	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// stamped returns the fill of the memory that the guests of e2e/ have.
func stamped(fill stamp.Fill) func(int64) []byte {
	return func(page int64) []byte {
		p := new(stamp.Page)
		p.Write(fill, uint32(page), 1)
		return unsafe.Slice((*byte)(unsafe.Pointer(p)), stamp.PageSize)
	}
}

// program fills memory with the file of this program, over and over, as an example of what programs have.
func program(t testing.TB) func(int64) []byte {
	content, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	pages := int64(len(content) / 4096)
	return func(page int64) []byte { return content[page%pages*4096:][:4096] }
}

// BenchmarkPacking sends the same memory over lanes on the loopback: raw, packed by each compression whatever it costs,
// and as the page server decides. cpu-ns/B is the CPU time, user and kernel, of both ends for a byte of a page. wire/B
// is how many bytes are sent for it.
func BenchmarkPacking(b *testing.B) {
	const size = 128 << 20
	for _, memory := range []struct {
		name string
		fill func(int64) []byte
	}{
		{"random", stamped(stamp.Random)},
		{"compressible", stamped(stamp.Compressible)},
		{"zero-mix", stamped(stamp.ZeroMix)},
		{"program", program(b)},
	} {
		f := ramFile(b, size, memory.fill)
		for _, kind := range []struct {
			name       string
			run, depth int
		}{{"demand", 4 << 10, 1}, {"short", 64 << 10, 4}, {"bulk", 512 << 10, 4}} {
			for _, way := range []struct {
				name   string
				names  string
				always bool
			}{{"raw", "", false}, {"s2", "s2", true}, {"zstd", "zstd", true}, {"decided", pagewire.Unpackable, false}} {
				if kind.name == "demand" && way.name == "zstd" {
					continue // the page server never packs demand lanes with Zstd
				}
				b.Run(fmt.Sprint(memory.name, "/", kind.name, "/", way.name), func(b *testing.B) {
					e, lane := offer(b, openRAM(b, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}), way.names)
					benchmarkLane(b, e, lane, size, kind.run, kind.depth, way.always)
				})
			}
		}
	}
}

// BenchmarkPackingSlowLink does the same for the sweep on a slow network. What counts is how many bytes of pages come
// per second.
func BenchmarkPackingSlowLink(b *testing.B) {
	const size = 128 << 20
	f := ramFile(b, size, program(b))
	for _, mbits := range []int{100, 1000} {
		for _, names := range []string{"", "s2", pagewire.Unpackable} {
			b.Run(fmt.Sprint(mbits, "Mbit/", names), func(b *testing.B) {
				s := NewServer(Options{})
				e, err := s.Offer(
					testID, testToken, openRAM(b, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}), isStopped,
				)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(e.Withdraw)
				slow := slowly(b, serve(b, s).Target()[len("passthrough:///"):], mbits*1e6/8)
				// On such a link the sweep asks for such short runs.
				benchmarkLane(b, e, openLane(b, dial(b, slow), testID, testToken, names), size, 64<<10, 8, false)
			})
		}
	}
}

// slowly returns the address of a proxy for address that forwards so many bytes a second to the client.
func slowly(b *testing.B, address string, rate int) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var both sync.WaitGroup
	b.Cleanup(both.Wait)
	b.Cleanup(func() { _ = listener.Close() })
	both.Go(func() {
		near, err := listener.Accept()
		if err != nil {
			return
		}
		defer near.Close()
		far, err := net.Dial("tcp", address)
		if err != nil {
			return
		}
		defer far.Close()
		// The queue is as long as a connection has it that fills a link: a window of some round trips.
		_ = far.(*net.TCPConn).SetReadBuffer(256 << 10)
		both.Go(func() {
			_, _ = io.Copy(far, near)
			_ = far.(*net.TCPConn).CloseWrite()
		})
		buf := make([]byte, 16<<10)
		for next := time.Now(); ; {
			n, err := far.Read(buf)
			if _, werr := near.Write(buf[:n]); err != nil || werr != nil {
				return
			}
			if now := time.Now(); next.Before(now.Add(-10 * time.Millisecond)) {
				next = now // the link was idle
			}
			next = next.Add(time.Second * time.Duration(n) / time.Duration(rate))
			time.Sleep(time.Until(next))
		}
	})
	return listener.Addr().String()
}

func benchmarkLane(b *testing.B, e *Export, lane testLane, size uint64, run, depth int, always bool) {
	request := pagewire.Request{Ranges: []pagewire.Range{{Length: uint32(run)}}}
	ask := func() {
		if always {
			e.link.ps.Store(allPays)
		}
		if err := lane.SendMsg(&request); err != nil {
			b.Fatal(err)
		}
		request.Ranges[0].Offset = (request.Ranges[0].Offset + uint64(run)) % size
	}
	for range depth {
		ask()
	}
	var reply pagewire.Reply
	defer reply.Release()
	b.SetBytes(int64(run))
	began := processorTime(b)
	for b.Loop() {
		for answered := 0; answered < run; {
			if err := lane.RecvMsg(&reply); err != nil {
				b.Fatal(err)
			}
			for _, run := range reply.Runs {
				answered += int(run.Length)
			}
		}
		ask()
	}
	b.ReportMetric(float64(processorTime(b)-began)/float64(b.N)/float64(run), "cpu-ns/B")
	if s := e.Stats(); s.PageBytes > 0 {
		b.ReportMetric(float64(s.Bytes)/float64(s.PageBytes), "wire/B")
	}
	b.ReportMetric(e.link.cost(), "link-ns/B")
}

func processorTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
