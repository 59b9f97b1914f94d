// SPDX-License-Identifier: Apache-2.0

package load

import (
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

func start(t *testing.T, c Config) *Load {
	t.Helper()
	if c.Memory == 0 {
		c.Memory = 64 * stamp.PageSize
	}
	if c.WorkingSet == 0 {
		c.WorkingSet = c.Memory
	}
	if c.Workers == 0 {
		c.Workers = 2
	}
	if c.Pattern == "" {
		c.Pattern = RandomOrder
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	// Workers never end; without load they only wait for tasks.
	t.Cleanup(func() { l.Run(false) })
	return l
}

// untilOps runs the load for n more visits.
func untilOps(t *testing.T, l *Load, n uint64) {
	t.Helper()
	want := l.Counters(0).TotalOps + n
	runUntil(t, l, func(c report.Counters) bool { return c.TotalOps >= want })
}

// runUntil runs the load until ok accepts its counters.
func runUntil(t *testing.T, l *Load, ok func(report.Counters) bool) {
	t.Helper()
	l.Run(true)
	for deadline := time.Now().Add(20 * time.Second); !ok(l.Counters(0)); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the counters stay at %+v", l.Counters(0))
		}
	}
	l.Run(false)
}

func TestCleanMemoryStaysClean(t *testing.T) {
	for _, pattern := range []Pattern{RandomOrder, Sequential, Stride} {
		for _, fill := range []stamp.Fill{stamp.Random, stamp.Compressible, stamp.ZeroMix} {
			l := start(t, Config{Pattern: pattern, Fill: fill, WritePercent: 50})
			untilOps(t, l, 5000)
			c := l.Counters(0)
			if pages, found := l.Verify(); pages != 64 || found != 0 || c.Corruptions != 0 {
				t.Errorf("%s, fill %d: %d pages, %d found, %+v", pattern, fill, pages, found, c)
			}
			if c.TotalWrites < 1500 || c.TotalWrites > c.TotalOps {
				t.Errorf("%s: %d writes in %d visits, want about half", pattern, c.TotalWrites, c.TotalOps)
			}
		}
	}
}

// Each kind of damage is found outside the working set, where only Verify looks.
func TestVerifyFindsDamageEverywhere(t *testing.T) {
	damages := map[stamp.Kind]func(*Load){
		stamp.Lost:      func(l *Load) { clear(l.pages[63][:]) },
		stamp.Stale:     func(l *Load) { l.pages[63].Write(l.config.Fill, 63, 0) },
		stamp.Ahead:     func(l *Load) { l.pages[63].Write(l.config.Fill, 63, 2) },
		stamp.Misplaced: func(l *Load) { l.pages[63] = l.pages[62] },
		stamp.Torn:      func(l *Load) { clear(l.pages[63][100:]) },
		stamp.Bitflip:   func(l *Load) { l.pages[63][9] ^= 4 },
		stamp.BadTable:  func(l *Load) { l.table[63] ^= 4 },
	}
	for kind, damage := range damages {
		t.Run(string(kind), func(t *testing.T) {
			l := start(t, Config{WorkingSet: 8 * stamp.PageSize, WritePercent: 100})
			l.Run(true) // Verify works during load
			damage(l)
			if _, found := l.Verify(); found != 1 {
				t.Errorf("Verify found %d, want 1", found)
			}
			d, ok := l.Corruption(0)
			if !ok || d.Kind != kind || d.Page != 63 {
				t.Errorf("Corruption = %+v, %v", d, ok)
			}
			if _, found := l.Verify(); found != 0 || l.Counters(0).Corruptions != 1 {
				t.Errorf("after the repair: found %d, corruptions %d", found, l.Counters(0).Corruptions)
			}
		})
	}
}

func TestStalePageWithItsStaleTableEntry(t *testing.T) {
	l := start(t, Config{WritePercent: 100})
	page, entry := l.pages[3], l.table[3]
	for range 100 { // only one of several workers visits it
		if untilOps(t, l, 5000); l.pages[3] != page {
			break
		}
	}
	if l.pages[3] == page {
		t.Fatal("no write was to page 3")
	}
	l.pages[3], l.table[3] = page, entry
	if _, found := l.Verify(); found != 1 {
		t.Errorf("Verify found %d, want the wrong sum", found)
	}
}

func TestLoadFindsDamage(t *testing.T) {
	l := start(t, Config{Pattern: Sequential})
	l.pages[40][5]++
	runUntil(t, l, func(c report.Counters) bool { return c.Corruptions > 0 }) // only one of several workers visits it
	untilOps(t, l, 1000)
	if c := l.Counters(0); c.Corruptions != 1 {
		t.Errorf("corruptions %d, want 1", c.Corruptions)
	}
}

func TestAllDamageIsCounted(t *testing.T) {
	l := start(t, Config{Memory: 1000 * stamp.PageSize})
	for i := range l.pages {
		l.pages[i] = stamp.Page{}
	}
	if _, found := l.Verify(); found != 1000 || l.Counters(0).Corruptions != 1000 {
		t.Errorf("found %d, counted %d, want 1000", found, l.Counters(0).Corruptions)
	}
}

func TestPatternsVisitTheWholeWorkingSetAndNoMore(t *testing.T) {
	for _, pattern := range []Pattern{RandomOrder, Sequential, Stride} {
		for _, working := range []uint32{5, 17, 20, 100} {
			l := &Load{config: Config{Pattern: pattern}}
			w := &worker{load: l, from: 1000, to: 2000, working: working, random: 1}
			seen := map[uint32]bool{}
			for range 10000 {
				seen[w.pick()-1000] = true
			}
			for i := range seen {
				if i >= working {
					t.Errorf("%s of %d: visited %d", pattern, working, i)
				}
			}
			if len(seen) != int(working) {
				t.Errorf("%s of %d: visited %d pages", pattern, working, len(seen))
			}
		}
	}
}

func TestWindowShowsAStallThatHasNotEnded(t *testing.T) {
	l := start(t, Config{})
	l.workers[0].began.Store(int64(l.now() - time.Second))
	if w := l.Window(0); w.MaxUS < 1e6 || w.Ops != 0 {
		t.Errorf("Window = %+v, want a stall of at least 1 s and no visit", w)
	}
}

func TestWindowsAddUp(t *testing.T) {
	l := start(t, Config{})
	var ops uint64
	var last report.Window
	for i := range 3 {
		untilOps(t, l, 100)
		last = l.Window(0)
		ops += last.Ops
		if last.Seq != uint64(i+1) || last.MaxUS < last.P50US/2 {
			t.Errorf("Window = %+v", last)
		}
	}
	if ops != last.TotalOps {
		t.Errorf("windows add up to %d visits, the total is %d", ops, last.TotalOps)
	}
}

func TestHistogramTakesWhatIsNew(t *testing.T) {
	var h histogram
	var seen [report.Buckets]uint64
	for i := int64(1); i <= 1000; i++ {
		h.add(i * 1000)
	}
	first := report.Histogram{}
	h.take(first, &seen)
	if q := first.Quantile(500); q < 500_000 || q > 570_000 {
		t.Errorf("median %d", q)
	}
	h.add(7)
	second := report.Histogram{}
	h.take(second, &seen)
	if len(second) != 1 || second[report.Bucket(7)] != 1 {
		t.Errorf("the second window has %v", second)
	}
}

func TestConfigThatMakesNoSense(t *testing.T) {
	for _, c := range []Config{
		{Memory: 4096, WorkingSet: 8192, Workers: 1},
		{Memory: 8192, WorkingSet: 4096, Workers: 2},
		{Memory: 8192, WorkingSet: 8192},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("New(%+v) accepts it", c)
		}
	}
	for _, c := range []Config{{Pattern: "zigzag"}, {Pattern: Idle, WritePercent: 101}, {Pattern: Idle, Rate: -1}} {
		if c.Validate() == nil {
			t.Errorf("Validate(%+v) accepts it", c)
		}
	}
}
