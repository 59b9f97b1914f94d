// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// TestGreedWaits: a destination that requests the same pages again and again is served at full speed until it has used
// up its quota, and slowly from then on.
func TestGreedWaits(t *testing.T) {
	e, lane := offer(t, smallRAM(t))
	fetch := func() {
		t.Helper()
		pages := 0
		if err := lane.fetch([]pagewire.Range{{Length: 8192}}, func(run pagewire.Run, _ []byte) {
			pages += int(run.Length)
		}); err != nil || pages != 8192 {
			t.Fatalf("%d bytes of pages, %v", pages, err)
		}
	}
	e.quota.fair = 10 * 8192
	for range 10 {
		fetch()
	}
	if n := e.Stats().Throttled; n != 0 {
		t.Errorf("%d requests waited that are its due", n)
	}
	for range 5 {
		fetch()
	}
	if n := e.Stats().Throttled; n != 5 {
		t.Errorf("%d of 5 requests waited", n)
	}
	// A request without pages counts, too, and a request that waits ends with its lane.
	if waited, err := e.quota.take(t.Context(), 0); !waited || err != nil {
		t.Errorf("a request for nothing: %v, %v", waited, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.quota.take(ended, pagewire.MaxRequestedBytes); err == nil {
		t.Error("a lane that is over waits on")
	}
}

// TestFairShare: the quota grows with the RAM.
func TestFairShare(t *testing.T) {
	ram := &RAM{blocks: []openBlock{{Block: Block{Size: 1 << 30}}, {Block: Block{Size: 2 << 30}}}}
	if g := newQuota(ram); g.fair != fairShare*3<<30+fairAllowance {
		t.Errorf("%d bytes are fair", g.fair)
	}
}
