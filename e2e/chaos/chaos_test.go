// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// short is how many cases are part of "make test": all kinds of faults once.
const (
	short     = 33
	shortSeed = 1
)

// TestShort plays the first cases of a seed.
func TestShort(t *testing.T) {
	if os.Getuid() != 0 {
		testenv.CannotRun(t, "hosts are made of namespaces, which needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 14*time.Minute)
	defer cancel()
	r, err := run(ctx, options{
		n: short, seed: shortSeed, only: -1, dir: filepath.Join("..", "..", "build", "chaos-short"),
	})
	if r != nil {
		r.print(os.Stdout)
		t.Log(r.summary())
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kinds) != len(slices.Compact(slices.Sorted(slices.Values(deck)))) {
		t.Errorf("%d kinds of faults were played", len(r.Kinds))
	}
}

// TestPointsAreThoseOfTheSource: points has every point of the source. A point that is missing would never be tested.
func TestPointsAreThoseOfTheSource(t *testing.T) {
	files, err := filepath.Glob("../../internal/migration/*.go")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`testPoint\("([^"]+)"\)`).FindAllStringSubmatch(string(text), -1) {
			found = append(found, match[1])
		}
	}
	var known []string
	for _, p := range points {
		known = append(known, p.name)
	}
	slices.Sort(found)
	slices.Sort(known)
	if !slices.Equal(found, known) {
		t.Errorf("the source has the points\n%v\nand this suite\n%v", found, known)
	}
}

func TestSequence(t *testing.T) {
	for name, p := range map[string]pack{"QEMUs": ofQEMUs, "domains": ofDomains} {
		t.Run(name, func(t *testing.T) { testSequence(t, p) })
	}
}

func testSequence(t *testing.T, p pack) {
	kinds, at := map[string]int{}, map[string]bool{}
	for i := range 40 * len(p.deck) {
		c := newCase(7, i, p, points)
		if c != newCase(7, i, p, points) {
			t.Fatalf("case %d is not always the same", i)
		}
		if c == newCase(8, i, p, points) {
			t.Errorf("case %d does not depend on the seed", i)
		}
		kinds[c.Kind]++
		at[c.At.Point] = true
		if c.Kind == killOurQEMU && !c.At.Switched {
			t.Errorf("%v: that kills a VM that has not gone yet", c)
		}
		if (c.Kind == killTheirQEMU || c.Kind == killTheirHost) && slices.Contains(tooLate, c.At.Point) {
			t.Errorf("%v: that kills a VM that has arrived", c)
		}
	}
	for _, kind := range p.deck {
		if kinds[kind]%40 != 0 || kinds[kind] == 0 {
			t.Errorf("%s comes %d times in 40 deckfuls", kind, kinds[kind])
		}
	}
	for _, p := range points {
		if !at[p.name] {
			t.Errorf("nothing happens at %s", p.name)
		}
	}
}

func TestOverlap(t *testing.T) {
	a, b := &lab.Host{Name: "a"}, &lab.Host{Name: "b"}
	at := time.UnixMilli
	for name, c := range map[string]struct {
		spans []span
		twice bool
		gap   time.Duration
	}{
		"none":  {nil, false, 0},
		"there": {[]span{{a, at(0), at(10)}, {b, at(15), at(30)}}, false, 5 * time.Millisecond},
		"there and back": {
			[]span{{a, at(0), at(10)}, {b, at(15), at(30)}, {a, at(50), at(60)}}, false, 20 * time.Millisecond,
		},
		"twice":           {[]span{{a, at(0), at(10)}, {b, at(9), at(30)}}, true, 0},
		"twice for long":  {[]span{{a, at(0), at(100)}, {b, at(9), at(30)}}, true, 0},
		"twice, not next": {[]span{{a, at(0), at(100)}, {a, at(1), at(2)}, {b, at(50), at(60)}}, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			if err := overlap(c.spans); (err != nil) != c.twice {
				t.Errorf("two copies: %v, want %v", err, c.twice)
			}
			if gap := longestGap(c.spans); !c.twice && gap != c.gap {
				t.Errorf("the longest gap is %v, want %v", gap, c.gap)
			}
		})
	}
}

// TestSpans: an event may come late, and it may be earlier than the answer to the first question to the QEMU.
func TestSpans(t *testing.T) {
	h := &lab.Host{Name: "a"}
	begin := time.Now()
	c := &copies{}
	c.ran(h, begin.Add(5*time.Second)) // the answer to a question: it runs
	c.ran(h, begin.Add(time.Second))   // the event: it has run since then
	c.stopped(h, begin.Add(6*time.Second))
	c.stopped(h, begin.Add(7*time.Second))
	spans := c.since(begin, begin.Add(10*time.Second))
	if len(spans) != 1 || !spans[0].from.Equal(begin.Add(time.Second)) || !spans[0].until.Equal(begin.Add(6*time.Second)) {
		t.Errorf("it ran %v", spans)
	}
	if c.runs(h) || len(c.since(begin.Add(6*time.Second), begin.Add(10*time.Second))) != 0 {
		t.Error("it runs yet")
	}
}
