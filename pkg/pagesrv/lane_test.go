// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

func TestTruncatedRAMEndsTheLane(t *testing.T) {
	for name, request := range map[string]struct {
		ranges []pagewire.Range
		holes  bool
	}{
		"a page":         {ranges: []pagewire.Range{{Offset: 512<<10 - 4096, Length: 8192}}},
		"what is behind": {ranges: []pagewire.Range{{Offset: 512 << 10, Length: 512 << 10}}},
		"as a hole":      {ranges: []pagewire.Range{{Offset: 512<<10 - 4096, Length: 4096}}, holes: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := ramFile(t, 1<<20, pattern)
			_, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: 1 << 20, PageSize: 4096}))
			if err := f.Truncate(512 << 10); err != nil {
				t.Fatal(err)
			}
			err := lane.request(&pagewire.Request{Ranges: request.ranges, Holes: request.holes},
				func(pagewire.Run, []byte) { t.Error("served") })
			wantCode(t, err, codes.DataLoss, "truncated")
		})
	}
}

// TestManyRunsTakeSeveralReplies: every second page is zero, which makes more runs than one reply may have.
func TestManyRunsTakeSeveralReplies(t *testing.T) {
	const pages = 4 * pagewire.MaxRuns
	f := ramFile(t, pages*4096, func(page int64) []byte {
		if page%2 == 0 {
			return nil
		}
		return pattern(page)
	})
	e, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: pages * 4096, PageSize: 4096}), "")
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
