// SPDX-License-Identifier: Apache-2.0

// The race detector makes sync.Pool forget at random.
//go:build !race

package pagesrv

import (
	"io"
	"math"
	"testing"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// wire is a stream without a network: it repeats one request and encodes the replies as gRPC would.
type wire struct {
	ranges []pagewire.Range
	left   int // requests
}

func (w *wire) RecvMsg(m any) error {
	if w.left == 0 {
		return io.EOF
	}
	w.left--
	r := m.(*pagewire.Request)
	r.Ranges = append(r.Ranges[:0], w.ranges...)
	return nil
}

func (w *wire) SendMsg(m any) error {
	message, err := pagewire.Codec{}.Marshal(m)
	if err == nil {
		message.Free()
	}
	return err
}

// gRPC allocates for each message; the page server must add nothing to that.
func TestServingAllocatesNothing(t *testing.T) {
	f := ramFile(t, 4<<20, mixed)
	s := NewServer()
	e, err := s.Offer(testID, testToken, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: 4 << 20, PageSize: 4096}), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	e.greed.fair = math.MaxUint64 // no destination asks for as much as all the runs below together
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
	// Many requests a run: what the end of a lane and a collected pool cost does not count.
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
