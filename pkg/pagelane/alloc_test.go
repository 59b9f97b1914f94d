// SPDX-License-Identifier: Apache-2.0

// The race detector makes sync.Pool drop items at random.
//go:build !race

package pagelane

import (
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// trip returns a function that makes one round trip for a run of so many bytes, with both ends in this process.
func trip(t testing.TB, w pair, length uint32) func() {
	address, _ := serve(t, w.server, true, func(s *Stream) error { return echo(s) })
	l, err := open(t, address, w.client, nil)
	if err != nil {
		t.Fatal(err)
	}
	ask := &pagewire.Request{Ranges: []pagewire.Range{{Offset: 1, Length: length}}}
	var reply pagewire.Reply
	return func() {
		if err := l.Send(ask); err != nil {
			t.Fatal(err)
		}
		if err := l.Recv(&reply); err != nil {
			t.Fatal(err)
		}
		if len(reply.Data) != int(length) {
			t.Fatalf("%d bytes", len(reply.Data))
		}
	}
}

func TestNothingIsAllocated(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		for _, length := range []uint32{4096, 512 << 10} {
			if n := testing.AllocsPerRun(2000, trip(t, w, length)); n != 0 {
				t.Errorf("%v allocations in a round trip of %d bytes", n, length)
			}
		}
	})
}

func BenchmarkRoundTrip(b *testing.B) {
	for name, w := range map[string]pair{"plaintext": plaintext(), "TLS": secure(b)} {
		b.Run(name, func(b *testing.B) {
			run := trip(b, w, 4096)
			b.ReportAllocs()
			for b.Loop() {
				run()
			}
		})
	}
}
