// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestAdopt: an engine continues with a descriptor whose messages an earlier one has read, as a daemon does that was
// started again.
func TestAdopt(t *testing.T) {
	g, demand, _, run := startSilent(t, 8, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	result := run(ctx)
	thread := g.read(0, 5, 0)
	demand.asked(t)
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v, want that it was cancelled", err)
	}
	second, err := New(Options{Blocks: []Block{g.blocks[0].Block}, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	g.Engine = second
	again := g.run(context.Background(), dial(t, realSource(t, layout{{kind: uffdtest.Shmem, pages: 8}}), 1))
	expect(t, thread, word(0, 5, 0)) // without the sweep, because the thread faults again
	g.StartSweep()
	mustEnd(t, again)
	g.verify()
}

// TestTakeUp: with the page states of the first engine, the second one requests nothing that has come, nor pages that
// are known to be zero.
func TestTakeUp(t *testing.T) {
	state := stateMemory([]uint64{8})
	g, demand, bulk, run := startSilent(t, 8, Options{State: state})
	ctx, cancel := context.WithCancel(context.Background())
	g.StartSweep()
	result := run(ctx)
	bulk.asked(t)
	bulk.sendPages(t, 0, 4) // page 3 is zero
	thread := g.read(0, 5, 0)
	demand.asked(t)
	until(t, "present", func() bool { return g.Stats().PagesPresent == 4 })
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v, want that it was cancelled", err)
	}
	second, err := New(Options{Blocks: []Block{g.blocks[0].Block}, Workers: 1, State: state})
	if err != nil {
		t.Fatal(err)
	}
	if s := second.Stats(); s.PagesPresent != 4 || s.PagesZero != 1 {
		t.Errorf("taken up: %+v", s)
	}
	g.Engine = second
	again := g.run(context.Background(), dial(t, realSource(t, layout{{kind: uffdtest.Shmem, pages: 8}}), 1))
	expect(t, thread, word(0, 5, 0))
	g.StartSweep()
	mustEnd(t, again)
	if s := second.Stats(); s.PageBytes != 4*pageSize || s.PagesPresent != 8 {
		t.Errorf("at the end: %+v", s)
	}
	g.verify()
}

// TestTakeUpFull: if the first engine ended with the last page, the second one needs no lanes.
func TestTakeUpFull(t *testing.T) {
	state := stateMemory([]uint64{pagesPerWord})
	for i := range state {
		state[i] = byte(zero)<<stateBits | byte(zero)
	}
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pagesPerWord}}, Options{State: state})
	thread := g.read(0, 5, 0)
	thread.WaitWaiting() // no engine runs
	if err := g.Run(context.Background(), nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	expect(t, thread, 0)
	select {
	case <-g.Done():
	default:
		t.Error("not done")
	}
}

// TestTakeUpUnmapped: the process has unmapped a whole block, as it does when a DIMM is unplugged. The next engine
// goes on with the others, whether the event of it was read or not.
func TestTakeUpUnmapped(t *testing.T) {
	for name, seen := range map[string]bool{"seen": true, "not seen": false} {
		t.Run(name, func(t *testing.T) {
			memory := layout{{kind: uffdtest.Shmem, pages: 4}, {kind: uffdtest.Shmem, pages: 40}}
			state := stateMemory([]uint64{4, 40})
			g := newTarget(t, memory, Options{Workers: 1, State: state})
			l, theirs := scripted(t, 1)
			ctx, cancel := context.WithCancel(context.Background())
			result := g.run(ctx, l)
			came := g.read(0, 1, 0)
			theirs[0].answer(t, pageSize)
			expect(t, came, word(0, 1, 0))
			waits := g.read(0, 2, 0)
			theirs[0].asked(t)
			unmap := uffdtest.Unmap(g.blocks[1].all())
			if seen {
				g.child.Go(unmap).JoinOK()
				until(t, "given up", func() bool { return g.Stats().PagesPresent == 41 })
			}
			cancel()
			if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
				t.Fatalf("Run: %v, want that it was cancelled", err)
			}
			var unmapping uffdtest.Pending
			if !seen {
				unmapping = g.child.Go(unmap)
				unmapping.WaitWaiting()
			}
			second, err := New(Options{Blocks: []Block{g.blocks[0].Block, g.blocks[1].Block}, Workers: 1, State: state})
			if err != nil {
				t.Fatal(err)
			}
			g.Engine = second
			again := g.run(context.Background(), dial(t, realSource(t, memory), 1))
			expect(t, waits, word(0, 2, 0))
			if !seen {
				unmapping.JoinOK()
			}
			g.StartSweep()
			mustEnd(t, again)
			if n := second.Stats().PageBytes; n > 3*pageSize {
				t.Errorf("%d bytes came, of three missing pages", n)
			}
		})
	}
}

// TestTakeUpElsewhere: a block of which a missing page is mapped is not given up, nor is one that was never registered.
func TestTakeUpElsewhere(t *testing.T) {
	g, _, _, _ := start(t, 40, Options{})
	b := g.blocks[0].Block
	b.Addr += b.Size / 2 // the second half of it is not mapped
	elsewhere := b
	elsewhere.Addr += 1 << 40
	state := stateMemory([]uint64{40})
	if _, err := New(Options{Blocks: []Block{elsewhere}, State: state}); err == nil {
		t.Error("memory that was never registered: accepted")
	}
	state[0] = byte(present)
	wrong := block{Block: b, pages: 40, shift: 12}
	table, _, err := newPages([]uint64{40}, state)
	if err != nil {
		t.Fatal(err)
	}
	if table.areUnmapped(&wrong) {
		t.Error("pages that are mapped are taken for unmapped")
	}
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

// TestStatesAreAFormat: another version of the daemon may take up a table, so the numbers of states are a format.
// Changing one takes another version.State.
func TestStatesAreAFormat(t *testing.T) {
	const n = 10
	memory := stateMemory([]uint64{n})
	for i, s := range []state{ // the numbers 0 to 9
		missing, swept, demanded, installing, present, zero, zeroing, ahead, lost, revoked,
	} {
		memory[i/2] |= byte(s) << (i % 2 * stateBits)
	}
	if want := []byte{0x10, 0x32, 0x54, 0x76, 0x98, 0, 0, 0}; !bytes.Equal(memory, want) {
		t.Fatalf("states are %x, want %x", memory, want)
	}
	table, _, err := newPages([]uint64{n}, memory)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []state{missing, missing, missing, missing, present, zero, zero, missing, lost, zero} {
		if got := table.get(uint64(i)); got != want {
			t.Errorf("state %d is taken up as %d, want %d", i, got, want)
		}
	}
}
