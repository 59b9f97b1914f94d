// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// TestHostileSource: if a source sends what was not requested, nothing of it is installed, and Run returns an error
// that names the reason. The next Run fills the memory rightly.
func TestHostileSource(t *testing.T) {
	const pages = 32
	for name, reply := range map[string]pagewire.Reply{
		"unasked page":      {Runs: []pagewire.Run{pagesOf(9, 1)}},
		"unasked zeros":     {Runs: []pagewire.Run{zerosOf(9, 1)}},
		"after asked page":  {Runs: []pagewire.Run{pagesOf(5, 2)}},
		"asked page twice":  {Runs: []pagewire.Run{pagesOf(5, 1), pagesOf(5, 1)}},
		"zeros twice":       {Runs: []pagewire.Run{zerosOf(5, 1), zerosOf(5, 1)}},
		"another block":     {Runs: []pagewire.Run{{Block: 1, Offset: 5 * pageSize, Length: pageSize}}},
		"beyond the end":    {Runs: []pagewire.Run{pagesOf(pages, 1)}},
		"across the end":    {Runs: []pagewire.Run{zerosOf(pages-1, 2)}},
		"far beyond":        {Runs: []pagewire.Run{{Offset: 1<<64 - 2*pageSize, Length: pageSize}}},
		"misaligned":        {Runs: []pagewire.Run{{Offset: 5*pageSize + 512, Length: pageSize}}},
		"half a page":       {Runs: []pagewire.Run{{Offset: 5 * pageSize, Length: pageSize / 2}}},
		"huge run of zeros": {Runs: []pagewire.Run{{Length: 1<<32 - pageSize, Zero: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			g, demand, _, run := start(t, pages, Options{})
			result := run()
			thread := g.read(0, 5, 0)
			demand.asked(t)
			for _, r := range reply.Runs {
				if !r.Zero {
					reply.Data = append(reply.Data, make([]byte, r.Length)...)
				}
			}
			// The page that was requested may be installed before the error is found, so it gets the right content.
			if r := reply.Runs[0]; r == pagesOf(5, 1) || r == pagesOf(5, 2) {
				fill(reply.Data[:pageSize], 0, 5)
			}
			if err := demand.stream.Send(&reply); err != nil {
				t.Fatal(err)
			}
			if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
				t.Fatalf("Run: %v, want ErrProtocol", err)
			}
			if name == "zeros twice" {
				expect(t, thread, 0) // this page was requested, and the source may say that it is zero
				return
			}
			g.resume(pages)
			expect(t, thread, word(0, 5, 0))
		})
	}
}

// TestSweepCheated: the source answers as many bytes as the sweep requested, but some pages twice and others not at
// all.
func TestSweepCheated(t *testing.T) {
	g, _, bulk, run := start(t, 8, Options{})
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, pagesOf(0, 2))
	bulk.send(t, pageSize, pagesOf(0, 2), pagesOf(4, 4))
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
		t.Fatalf("Run: %v, want ErrProtocol", err)
	}
	if s := g.Stats(); s.PagesPresent != 6 {
		t.Errorf("%d pages present, want 6", s.PagesPresent)
	}
}

// TestMalformedReply: a reply that cannot be decoded is an error of the source, not a lost lane.
func TestMalformedReply(t *testing.T) {
	g, demand, _, run := start(t, 8, Options{})
	result := run()
	thread := g.read(0, 5, 0)
	demand.asked(t)
	// The reply has a run of no bytes.
	if err := demand.stream.Send(&pagewire.Reply{Runs: []pagewire.Run{{Offset: 5 * pageSize, Zero: true}}}); err != nil {
		t.Fatal(err)
	}
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
		t.Fatalf("Run: %v, want ErrProtocol", err)
	}
	g.resume(8)
	expect(t, thread, word(0, 5, 0))
}
