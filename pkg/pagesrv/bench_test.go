// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// BenchmarkFetch measures a round trip over gRPC's library and the loopback. Both ends are in this process, so the
// allocations are those of both.
func BenchmarkFetch(b *testing.B) {
	const size = 64 << 20
	for _, bench := range []struct {
		name string
		run  uint32
		fill func(int64) []byte
	}{
		{"demand/4KiB", 4 << 10, pattern},
		{"demand/4KiB/zero", 4 << 10, func(int64) []byte { return nil }},
		{"bulk/512KiB", 512 << 10, pattern},
		{"bulk/512KiB/mixed", 512 << 10, mixed},
		{"bulk/512KiB/holes", 512 << 10, func(int64) []byte { return nil }},
	} {
		b.Run(bench.name, func(b *testing.B) {
			f := ramFile(b, size, bench.fill)
			_, lane := offer(b, openRAM(b, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}))
			request := pagewire.Request{Ranges: []pagewire.Range{{Length: bench.run}}}
			var reply pagewire.Reply
			defer reply.Release()
			b.SetBytes(int64(bench.run))
			b.ReportAllocs()
			for b.Loop() {
				if err := lane.SendMsg(&request); err != nil {
					b.Fatal(err)
				}
				for answered := uint32(0); answered < bench.run; {
					if err := lane.RecvMsg(&reply); err != nil {
						b.Fatal(err)
					}
					for _, run := range reply.Runs {
						answered += run.Length
					}
				}
				r := &request.Ranges[0]
				r.Offset = (r.Offset + uint64(bench.run)) % size
			}
		})
	}
}

// BenchmarkBulkPipelined keeps several requests in flight, as the sweep does.
func BenchmarkBulkPipelined(b *testing.B) {
	const size, run, depth = 64 << 20, 512 << 10, 4
	f := ramFile(b, size, pattern)
	_, lane := offer(b, openRAM(b, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}))
	request := pagewire.Request{Ranges: []pagewire.Range{{Length: run}}}
	ask := func() {
		if err := lane.SendMsg(&request); err != nil {
			b.Fatal(err)
		}
		request.Ranges[0].Offset = (request.Ranges[0].Offset + run) % size
	}
	for range depth {
		ask()
	}
	var reply pagewire.Reply
	defer reply.Release()
	b.SetBytes(run)
	b.ReportAllocs()
	for b.Loop() {
		if err := lane.RecvMsg(&reply); err != nil {
			b.Fatal(err)
		}
		if len(reply.Data) != run {
			b.Fatalf("reply of %d bytes", len(reply.Data))
		}
		ask()
	}
}
