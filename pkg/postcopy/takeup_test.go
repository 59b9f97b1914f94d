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
