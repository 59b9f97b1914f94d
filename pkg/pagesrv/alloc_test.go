// SPDX-License-Identifier: Apache-2.0

// The race detector makes sync.Pool drop items at random.
//go:build !race

package pagesrv

import (
	"io"
	"math"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// wire is a stream without a network: it returns the same request again and again, and encodes the replies as gRPC's
// library would.
type wire struct {
	ranges []pagewire.Range
	left   int // requests still to come
}

func (w *wire) Recv(r *pagewire.Request) error {
	if w.left == 0 {
		return io.EOF
	}
	w.left--
	r.Ranges = append(r.Ranges[:0], w.ranges...)
	return nil
}

func (w *wire) Send(reply *pagewire.Reply) error {
	message, err := pagewire.Codec{}.Marshal(reply)
	if err == nil {
		message.Free()
	}
	return err
}

// TestServingAllocatesNothing: gRPC's library allocates for each message. The page server must not add to that.
func TestServingAllocatesNothing(t *testing.T) {
	f := ramFile(t, 4<<20, mixed)
	s := NewServer(Options{})
	e, err := s.Offer(
		testID, testToken, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: 4 << 20, PageSize: 4096}), isStopped,
	)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	e.quota.fair = math.MaxUint64 // no destination asks for as much as all the runs below together
	for name, ranges := range map[string][]pagewire.Range{
		"zero page":     {{Offset: 4096, Length: 4096}},
		"one page":      {{Offset: 2 * 4096, Length: 4096}},
		"several pages": {{Offset: 4096, Length: 4096}, {Offset: 20480, Length: 4096}, {Offset: 1 << 20, Length: 8192}},
		"bulk":          {{Offset: 0, Length: 512 << 10}},
	} {
		for _, unpackable := range []string{"", "s2", "zstd", pagewire.Unpackable} {
			t.Run(name+"/"+unpackable, func(t *testing.T) {
				servingAllocatesNothing(t, e, ranges, unpackable)
			})
		}
	}
}

func servingAllocatesNothing(t *testing.T, e *Export, ranges []pagewire.Range, unpackable string) {
	l, err := e.open(announcing(t.Context(), unpackable))
	if err != nil {
		t.Fatal(err)
	}
	defer e.close(l)
	w := &wire{ranges: ranges}
	// Each run has many requests, so that what the end of a lane allocates, and a pool that was collected, hardly counts.
	const requests = 1000
	allocs := testing.AllocsPerRun(5, func() {
		e.link.ps.Store(allPays)
		w.left = requests
		if err := l.serve(t.Context(), w); err != nil {
			t.Fatal(err)
		}
	})
	if perRequest := allocs / requests; perRequest > 0.05 {
		t.Errorf("%.2f allocations per request", perRequest)
	}
	s := l.counters.load()
	packs := unpackable != "" && (ranges[0].Length >= bulkReply || unpackable != "zstd") && s.PageBytes > 0
	if (s.Bytes < s.PageBytes) != packs {
		t.Errorf("%d bytes sent for %d", s.Bytes, s.PageBytes)
	}
}
