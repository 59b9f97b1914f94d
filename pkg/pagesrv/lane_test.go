// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"io"
	"testing"

	"google.golang.org/grpc/codes"

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
	for name, ranges := range map[string][]pagewire.Range{
		"one page":      {{Offset: 4096, Length: 4096}},
		"several pages": {{Offset: 4096, Length: 4096}, {Offset: 20480, Length: 4096}, {Offset: 1 << 20, Length: 8192}},
		"bulk":          {{Offset: 0, Length: 512 << 10}},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := e.open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer e.close(l)
			w := &wire{ranges: ranges}
			// Many requests a run: what the end of a lane and a collected pool cost does not count.
			const requests = 1000
			allocs := testing.AllocsPerRun(5, func() {
				w.left = requests
				if err := l.serve(t.Context(), w); err != nil {
					t.Fatal(err)
				}
			})
			if perRequest := allocs / requests; perRequest > 0.05 {
				t.Errorf("%.2f allocations per request", perRequest)
			}
		})
	}
}

func TestTruncatedRAMEndsTheLane(t *testing.T) {
	f := ramFile(t, 1<<20, pattern)
	_, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: 1 << 20, PageSize: 4096}))
	if err := f.Truncate(512 << 10); err != nil {
		t.Fatal(err)
	}
	err := lane.fetch([]pagewire.Range{{Offset: 512<<10 - 4096, Length: 8192}}, func(pagewire.Run, []byte) { t.Error("served") })
	wantCode(t, err, codes.DataLoss, "truncated")
}

// More runs than a reply may have: every second page is zero.
func TestManyRunsTakeSeveralReplies(t *testing.T) {
	const pages = 4 * pagewire.MaxRuns
	f := ramFile(t, pages*4096, func(page int64) []byte {
		if page%2 == 0 {
			return nil
		}
		return pattern(page)
	})
	e, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: pages * 4096, PageSize: 4096}))
	next := uint64(0)
	err := lane.fetch([]pagewire.Range{{Length: pages * 4096}}, func(run pagewire.Run, _ []byte) {
		if run.Offset != next || run.Length != 4096 || run.Zero != (next/4096%2 == 0) {
			t.Errorf("run %+v, want the page at %#x", run, next)
		}
		next += 4096
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := e.Stats().Replies; got != 4 {
		t.Errorf("%d replies, want 4 full ones", got)
	}
}
