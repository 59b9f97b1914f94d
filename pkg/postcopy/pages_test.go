// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"pgregory.net/rapid"
)

// TestPagesModel drives the page table with random calls beside a model that is as plain as possible.
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
		// move changes the model like one call, by the arrows of the picture.
		move := func(p uint64, arrows map[state]state) (from state) {
			from = model[p]
			if to, ok := arrows[from]; ok {
				model[p] = to
			}
			return from
		}
		// run is how many pages from p on lie in the block.
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
					move(p, map[state]state{swept: missing, ahead: missing, demanded: missing, installing: missing, zeroing: zero})
				}
				if table, _, err = newPages(counts, memory); err != nil {
					t.Fatal(err)
				}
			},
			"fault": func(t *rapid.T) {
				p := page(t)
				from := move(p, map[state]state{missing: demanded, swept: demanded, ahead: demanded, zero: zeroing})
				want := map[state]claim{missing: claimRequest, swept: claimAgain, ahead: claimWait, zero: claimZero, present: claimPresent,
					demanded: claimNothing, installing: claimNothing, zeroing: claimNothing}[from]
				if got := table.claimFault(p); got != want {
					t.Fatalf("fault in state %d: %d, want %d", from, got, want)
				}
			},
			"sweep": func(t *rapid.T) {
				from := page(t)
				p, ok := table.nextMissing(from)
				want, wantOK := uint64(0), false
				for i := range all { // the first missing page at from or after, else the first of all
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
				want, ok := map[state]arrival{missing: arrivalUnasked, swept: arrivalInstall, ahead: arrivalInstall, demanded: arrivalInstall}[from]
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
			"finish": func(t *rapid.T) {
				p := page(t)
				n := run(t, p)
				for q := range n {
					move(p+q, map[state]state{installing: present})
				}
				table.finish(p, n)
			},
			"give up":      func(t *rapid.T) { p := page(t); move(p, map[state]state{installing: missing}); table.giveUp(p, 1) },
			"finish zero":  func(t *rapid.T) { p := page(t); move(p, map[state]state{zeroing: present}); table.finishZero(p) },
			"give up zero": func(t *rapid.T) { p := page(t); move(p, map[state]state{zeroing: zero}); table.giveUpZero(p) },
			"discard": func(t *rapid.T) {
				p := page(t)
				n := run(t, p)
				for q := range n {
					move(p+q, map[state]state{missing: zero, swept: zero, ahead: zero, demanded: zero, installing: zero})
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

// TestPagesParallel: with everyone at it at once, each page is installed by one, and all become known.
func TestPagesParallel(t *testing.T) {
	const n = 5000
	table := mustPages(t, n)
	var installers [n]atomic.Int32
	// A page that is given up while it is installed may get a second installer, of zeros.
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
		wg.Go(func() { // a worker, and the source's answers
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

// stateMemory is memory for Options.State of blocks of so many pages.
func stateMemory(pages []uint64) []byte {
	size := 0
	for _, n := range pages {
		size += StateSize([]Block{{Size: n * pageSize, PageSize: pageSize}})
	}
	words := make([]uint64, size/wordSize) // a []byte need not be aligned
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

func TestStateOfAnotherVM(t *testing.T) {
	memory := stateMemory([]uint64{100})
	for name, bad := range map[string][]byte{
		"too short": memory[:len(memory)-wordSize], "not aligned": stateMemory([]uint64{200})[1 : 1+len(memory)],
		"no states": append([]byte{0x0f}, memory[1:]...),
	} {
		if _, _, err := newPages([]uint64{100}, bad); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestStatesAreAFormat: a table outlives the daemon, and the next one, of another version, takes it up. Who changes a
// number here raises version.State.
func TestStatesAreAFormat(t *testing.T) {
	const n = 8
	memory := stateMemory([]uint64{n})
	for i, s := range []state{missing, swept, demanded, installing, present, zero, zeroing, ahead} { // 0 to 7
		memory[i/2] |= byte(s) << (i % 2 * stateBits)
	}
	if want := []byte{0x10, 0x32, 0x54, 0x76, 0, 0, 0, 0}; !bytes.Equal(memory, want) {
		t.Fatalf("states are %x, want %x", memory, want)
	}
	table, _, err := newPages([]uint64{n}, memory)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []state{missing, missing, missing, missing, present, zero, zero, missing} {
		if got := table.get(uint64(i)); got != want {
			t.Errorf("state %d is taken up as %d, want %d", i, got, want)
		}
	}
}
