// SPDX-License-Identifier: Apache-2.0

// The race detector makes sync.Pool forget at random.
//go:build !race

package pagelane

import (
	"testing"

	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// trip returns a round trip for a run of so many bytes, that of both ends.
func trip(t testing.TB, length uint32) func() {
	address, _ := serve(t, insecure.NewCredentials(), true, func(s *Stream) error { return echo(s) })
	l, err := open(t, address, insecure.NewCredentials(), nil)
	if err != nil {
		t.Fatal(err)
	}
	ask := &pagewire.Request{Ranges: []pagewire.Range{{Offset: 1, Length: length}}}
	var reply pagewire.Reply
	return func() {
		if err := l.SendMsg(ask); err != nil {
			t.Fatal(err)
		}
		if err := l.RecvMsg(&reply); err != nil {
			t.Fatal(err)
		}
		if len(reply.Data) != int(length) {
			t.Fatalf("%d bytes", len(reply.Data))
		}
	}
}

func TestNothingIsAllocated(t *testing.T) {
	for _, length := range []uint32{4096, 512 << 10} {
		if n := testing.AllocsPerRun(2000, trip(t, length)); n != 0 {
			t.Errorf("%v allocations in a round trip of %d bytes", n, length)
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	run := trip(b, 4096)
	b.ReportAllocs()
	for b.Loop() {
		run()
	}
}
