// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math/bits"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"pgregory.net/rapid"
)

// TestPagesModel compares the page table with a simple model, by random calls.
func TestPagesModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		counts := rapid.SliceOfN(rapid.Uint64Range(1, 40), 1, 3).Draw(t, "blocks")
		memory := stateMemory(counts)
		table, first, err := newPages(counts, memory)
		if err != nil {
			t.Fatal(err)
		}
		model := map[uint64]state{}
		var all []uint64
		for i, n := range counts {
			for p := range n {
				all = append(all, first[i]+p)
				model[first[i]+p] = missing
			}
		}
		page := func(t *rapid.T) uint64 { return rapid.SampledFrom(all).Draw(t, "page") }
		// move changes the state of a page in the model, along the arrows of the drawing in pages.go.
		move := func(p uint64, arrows map[state]state) (from state) {
			from = model[p]
			if to, ok := arrows[from]; ok {
				model[p] = to
			}
			return from
		}
		// run returns how many pages from p on a call is for. They are in one block.
		run := func(t *rapid.T, p uint64) uint64 {
			for i, n := range counts {
				if p >= first[i] && p < first[i]+n {
					return rapid.Uint64Range(1, first[i]+n-p).Draw(t, "run")
				}
			}
			panic("no block")
		}
		t.Repeat(map[string]func(*rapid.T){
			"the process ends, another takes up": func(t *rapid.T) {
				for _, p := range all {
					move(p, map[state]state{
						swept: missing, ahead: missing, demanded: missing, installing: missing, zeroing: zero, revoked: zero,
					})
				}
				if table, _, err = newPages(counts, memory); err != nil {
					t.Fatal(err)
				}
			},
			"fault": func(t *rapid.T) {
				p := page(t)
				from := move(p, map[state]state{missing: demanded, swept: demanded, ahead: demanded, zero: zeroing})
				want := map[state]claim{
					missing: claimRequest, swept: claimAgain, ahead: claimWait, zero: claimZero, present: claimPresent,
					demanded: claimNothing, installing: claimNothing, revoked: claimNothing, zeroing: claimNothing,
				}[from]
				if got := table.claimFault(p); got != want {
					t.Fatalf("fault in state %d: %d, want %d", from, got, want)
				}
			},
			"sweep": func(t *rapid.T) {
				from := page(t)
				p, ok := table.nextMissing(from)
				want, wantOK := uint64(0), false
				for i := range all { // the first missing page from there on, or else the first of all
					if q := all[len(all)-1-i]; model[q] == missing && (q >= from || !wantOK || want < from) {
						want, wantOK = q, true
					}
				}
				if p != want || ok != wantOK {
					t.Fatalf("next missing from %d: %d %v, want %d %v", from, p, ok, want, wantOK)
				}
				if ok {
					limit, n := run(t, p), uint64(0)
					for n < limit && model[p+n] == missing {
						model[p+n] = swept
						n++
					}
					if got := table.claimSweep(p, limit); got != n {
						t.Fatalf("claimed %d, want %d", got, n)
					}
				}
			},
			"ahead": func(t *rapid.T) {
				p := page(t)
				from := move(p, map[state]state{missing: ahead})
				if got := table.claimAhead(p); got != (from == missing) {
					t.Fatalf("claim ahead in state %d: %v", from, got)
				}
			},
			"arrive": func(t *rapid.T) {
				p := page(t)
				from := move(p, map[state]state{swept: installing, ahead: installing, demanded: installing})
				want, ok := map[state]arrival{
					missing: arrivalUnasked, swept: arrivalInstall, ahead: arrivalInstall, demanded: arrivalInstall,
				}[from]
				if !ok {
					want = arrivalDrop
				}
				if got := table.arrive(p); got != want {
					t.Fatalf("arrival in state %d: %d, want %d", from, got, want)
				}
			},
			"arrive zero": func(t *rapid.T) {
				p := page(t)
				from := move(p, map[state]state{swept: zero, ahead: zero, demanded: zeroing})
				want, ok := map[state]arrival{missing: arrivalUnasked, demanded: arrivalInstall}[from]
				if !ok {
					want = arrivalDrop
				}
				if got := table.arriveZero(p); got != want {
					t.Fatalf("zero arrival in state %d: %d, want %d", from, got, want)
				}
			},
			"hole": func(t *rapid.T) {
				p := page(t)
				end, marked := p+run(t, p), uint64(0)
				for q := p; q < end; q = wordEnd(q) {
					want, waits := uint64(0), uint16(0)
					for r := q; r < min(end, wordEnd(q)); r++ {
						switch move(r, map[state]state{missing: zero, demanded: zeroing}) {
						case demanded:
							waits |= 1 << (r % pagesPerWord)
							want++
						case missing:
							want++
						}
					}
					n, waited := table.hole(q, end)
					if n != want || waited != waits {
						t.Fatalf("a hole from %d to %d: %d marked, %#x waited for; want %d, %#x", q, end, n, waited, want, waits)
					}
					marked += n
				}
				table.hollowed(marked)
			},
			"finish": func(t *rapid.T) {
				p := page(t)
				n := run(t, p)
				for q := range n {
					move(p+q, map[state]state{installing: present, revoked: present})
				}
				table.finish(p, n)
			},
			"give up": func(t *rapid.T) {
				p := page(t)
				move(p, map[state]state{installing: missing, revoked: zero})
				table.giveUp(p, 1)
			},
			"drop":         func(t *rapid.T) { p := page(t); move(p, map[state]state{revoked: zero}); table.drop(p) },
			"finish zero":  func(t *rapid.T) { p := page(t); move(p, map[state]state{zeroing: present}); table.finishZero(p) },
			"give up zero": func(t *rapid.T) { p := page(t); move(p, map[state]state{zeroing: zero}); table.giveUpZero(p) },
			"discard": func(t *rapid.T) {
				p := page(t)
				n := run(t, p)
				for q := range n {
					move(p+q, map[state]state{missing: zero, swept: zero, ahead: zero, demanded: zero, installing: revoked})
				}
				table.discard(p, n)
			},
			"put back": func(*rapid.T) {
				for _, p := range all {
					move(p, map[state]state{swept: missing, ahead: missing, demanded: missing})
				}
				table.putBack()
			},
			"": func(t *rapid.T) {
				left := int64(0)
				for _, p := range all {
					if got := table.get(p); got != model[p] {
						t.Fatalf("page %d is in state %d, want %d", p, got, model[p])
					}
					if s := model[p]; s != present && s != zero && s != zeroing {
						left++
					}
				}
				full := false
				select {
				case <-table.full:
					full = true
				default:
				}
				if table.left.Load() != left || full != (left == 0) {
					t.Fatalf("%d left, full %v; want %d", table.left.Load(), full, left)
				}
			},
		})
	})
}

// TestPagesParallel: when all kinds of callers work at once, each page is installed by one of them, and all pages
// become known.
func TestPagesParallel(t *testing.T) {
	const n = 5000
	table := mustPages(t, n)
	var installers [n]atomic.Int32
	// If a page is given up while it is being installed, it may be installed once more, as zeros.
	givenUp := func(p uint64) bool { return p%64 < 8 }
	install := func(p uint64) {
		if installers[p].Add(1) != 1 && !givenUp(p) {
			t.Errorf("page %d has two installers", p)
		}
		runtime.Gosched()
		installers[p].Add(-1)
	}
	var wg sync.WaitGroup
	for seed := range uint64(4) {
		wg.Go(func() { // a worker, and the receiver of its lane
			random := rand.New(rand.NewPCG(seed, 0))
			for range 4 * n {
				p := random.Uint64N(n)
				switch table.claimFault(p) {
				case claimRequest, claimAgain:
					if random.IntN(2) == 0 && table.arrive(p) == arrivalInstall {
						install(p)
						table.finish(p, 1)
					} else if table.arriveZero(p) == arrivalInstall {
						install(p)
						table.finishZero(p)
					}
				case claimZero:
					install(p)
					if random.IntN(2) == 0 {
						table.giveUpZero(p)
					} else {
						table.finishZero(p)
					}
				}
				if random.IntN(64) == 0 {
					table.discard(p-p%64, min(8, n-(p-p%64)))
				}
			}
		})
	}
	wg.Go(func() { // holes, which come on other lanes
		random := rand.New(rand.NewPCG(4, 0))
		for range n / 8 {
			p := random.Uint64N(n)
			marked, waited := table.hole(p, min(n, p+random.Uint64N(40)+1))
			for ; waited != 0; waited &= waited - 1 {
				q := p/pagesPerWord*pagesPerWord + uint64(bits.TrailingZeros16(waited))
				install(q)
				table.finishZero(q)
			}
			table.hollowed(marked)
		}
	})
	wg.Go(func() { // the sweep
		for {
			p, ok := table.nextMissing(0)
			if !ok {
				return
			}
			for q := range table.claimSweep(p, 128) {
				if table.arrive(p+q) == arrivalInstall {
					install(p + q)
					table.finish(p+q, 1)
				}
			}
		}
	})
	wg.Wait()
	select {
	case <-table.full:
	default:
		t.Errorf("%d pages are left", table.left.Load())
	}
}

// stateMemory returns memory for Options.State of blocks of so many pages.
func stateMemory(pages []uint64) []byte {
	size := 0
	for _, n := range pages {
		size += StateSize([]Block{{Size: n * pageSize, PageSize: pageSize}})
	}
	words := make([]uint64, size/wordSize) // a []byte may not be aligned
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), size)
}

func mustPages(t testing.TB, n uint64) *pages {
	t.Helper()
	table, _, err := newPages([]uint64{n}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return table
}
