// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"fmt"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

var all = pagewire.Announced([]string{pagewire.Unpackable})

// at returns how long size bytes take, at so many ns per byte.
func at(size int, ns float64) time.Duration { return time.Duration(float64(size) * ns) }

func TestWhatPays(t *testing.T) {
	for _, test := range []struct {
		name  string
		pack  float64 // ns per byte
		ratio float64
		link  float64 // ns per byte
		pays  bool
	}{
		{"repetitive, loopback", 0.1, 0.04, copying, true},
		{"repetitive, slow processor, loopback", 0.4, 0.04, copying, false},
		{"program, loopback", 1.5, 0.6, copying, false},
		{"program, 10 Gbit/s", 1.5, 0.6, 0.8, false},
		{"program, 1 Gbit/s", 1.5, 0.6, 8, true},
		{"hardly smaller, 1 Gbit/s", 0.5, 0.86, 8, true},
		{"not worthwhile, 100 Mbit/s", 0.5, 0.9, 80, false},
		{"noise, 100 Mbit/s", 0.1, 1.001, 80, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			const size = 512 << 10
			j := newJudge(all, true)
			j.s2.pack = test.pack
			if got := j.paid(pagewire.S2, size, int(test.ratio*size), at(size, test.pack), test.link); got != test.pays {
				t.Errorf("pays: %v", got)
			}
			if j.doubts() == test.pays || j.sleeps() == test.pays {
				t.Errorf("doubts afterwards: %+v", j)
			}
		})
	}
}

func TestWhichMethod(t *testing.T) {
	typical := func(s2, s2Ratio, zstd, zstdRatio float64) judge {
		j := newJudge(all, true)
		j.s2.pack, j.s2.ratio, j.zstd.pack, j.zstd.ratio = s2, s2Ratio, zstd, zstdRatio
		return j
	}
	program, repetitive := typical(1.5, 0.58, 5, 0.43), typical(0.1, 0.037, 0.5, 0.034)
	demand := program
	demand.bulk = false
	only := func(names string) judge {
		j := program
		j.announced = pagewire.Announced([]string{names})
		return j
	}
	for _, test := range []struct {
		name string
		j    judge
		size int
		link float64
		want pagewire.Compression
	}{
		{"program, loopback", program, 512 << 10, copying, pagewire.S2},
		{"program, 1 Gbit/s", program, 512 << 10, 8, pagewire.S2},
		{"program, 100 Mbit/s", program, 512 << 10, 80, pagewire.Zstd},
		{"program, 100 Mbit/s, a page", program, 4 << 10, 80, pagewire.S2},
		{"program, 100 Mbit/s, demand lane", demand, 2 << 20, 80, pagewire.S2},
		{"repetitive, 1 Gbit/s", repetitive, 512 << 10, 8, pagewire.S2},
		{"only zstd", only("zstd"), 512 << 10, 8, pagewire.Zstd},
		{"only zstd, a page", only("zstd"), 4 << 10, 80, pagewire.None},
		{"only s2, 100 Mbit/s", only("s2"), 512 << 10, 80, pagewire.S2},
	} {
		t.Run(test.name, func(t *testing.T) {
			others := 0
			for turn := range 10 * otherTurn {
				if got := test.j.choose(test.size, test.link); got != test.want {
					if others++; (turn+1)%otherTurn != 0 {
						t.Fatalf("%v, want %v", got, test.want)
					}
				}
			}
			// The other compression is tried now and then, where it might pay.
			retried := test.j.bulk && test.size >= bulkReply && test.link > 1 && test.j.announced == all
			if want := 10; retried && others != want || !retried && others != 0 {
				t.Errorf("the other one was tried %d times", others)
			}
		})
	}
}

// TestNothingAnnounced: if the peer announced no compression, packing is never tried.
func TestNothingAnnounced(t *testing.T) {
	j := newJudge(0, true)
	for range 3 * longestPageRest {
		if !j.sleeps() {
			t.Fatal("a reply is looked at")
		}
	}
}

// TestRests: while memory does not pack, the rests between two tries get twice as long each time, up to a limit. They
// end as soon as it packs.
func TestRests(t *testing.T) {
	for size, want := range map[int]string{
		2 * samplePiece: "[2 4 8 16 16 16 16]",
		4096:            "[2 4 8 16 32 64 64]",
	} {
		j := newJudge(all, true)
		if j.sleeps() || !j.doubts() {
			t.Fatal("a lane begins with a sample")
		}
		var rests []int
		for range 7 {
			if j.paid(pagewire.S2, size, size, at(size, 0.1), 8) {
				t.Fatal("noise pays")
			}
			slept := 0
			for j.sleeps() {
				slept++
			}
			rests = append(rests, slept)
			if !j.doubts() {
				t.Fatal("no sample after a rest")
			}
		}
		if got := fmt.Sprint(rests); got != want {
			t.Errorf("%d bytes: rests of %v replies, want %v", size, got, want)
		}
		if !j.paid(pagewire.S2, size, size/2, at(size, 0.1), 8) || j.sleeps() || j.doubts() {
			t.Errorf("it pays now: %+v", j)
		}
		if j.paid(pagewire.S2, size, size, at(size, 0.1), 8) || !j.sleeps() || j.sleeps() {
			t.Errorf("a rest of one: %+v", j)
		}
	}
}

// TestInterruptedPacking: one packing that took long, because of an interruption, changes nothing. Packing that stays
// slow is noticed soon.
func TestInterruptedPacking(t *testing.T) {
	const size = 512 << 10
	j := newJudge(all, true)
	good := func(took time.Duration) bool { return j.paid(pagewire.S2, size, size/25, took, copying) }
	if !good(at(size, 0.08)) || !good(20*time.Millisecond) || !good(at(size, 0.08)) {
		t.Error("an interruption made a good reply a bad one")
	}
	n := 1
	for ; good(at(size, 1)) && n < 100; n++ {
	}
	if n > 6 {
		t.Errorf("slow packing is noticed after %d replies", n)
	}
}

func TestLinkIsLearned(t *testing.T) {
	const reply, Gbit = 512 << 10, 8.0 // ns per byte
	var l link
	if l.cost() != copying {
		t.Error("a link of which nothing is known is not fast")
	}
	replies := func(n, carried int, took, waited time.Duration) {
		for range n {
			l.learn(reply, carried, took, waited)
		}
	}
	within := func(what string, least, most float64) {
		t.Helper()
		if got := l.cost(); got < least || got > most {
			t.Errorf("%s: %.2f ns a byte, want %.2f to %.2f", what, got, least, most)
		}
	}
	replies(1, reply, 10*time.Millisecond, 10*time.Millisecond)
	within("one interruption", copying, 2*copying)
	replies(100, reply, at(reply, 0.1), at(reply, 0.1))
	within("fast again", copying, copying)
	replies(100, reply/25, at(reply, 0.2), at(reply, 0.2))
	within("a busy receiver", copying, copying)
	replies(100, reply, at(reply, 20), at(reply, 1))
	within("we are slow, not the link", copying, 1)
	replies(40, reply, at(reply, Gbit), at(reply, Gbit/2))
	within("a slow link", 0.9*Gbit, Gbit)
	replies(40, reply/2, at(reply/2, Gbit), at(reply/2, Gbit/3))
	within("a slow link, packed", 0.9*Gbit, Gbit)
	replies(10, reply/25, at(reply, 0.1), 0)
	within("a slow link, hardly used", 0.9*0.9*Gbit, Gbit)
	replies(2000, reply/25, at(reply, 0.1), 0)
	within("forgotten", copying, copying)
}

// still is a stream on which each Recv and Send takes so long.
type still struct{ takes time.Duration }

func (s still) Recv(*pagewire.Request) error { time.Sleep(s.takes); return nil }
func (s still) Send(*pagewire.Reply) error   { time.Sleep(s.takes); return nil }

// TestWhatShowsTheLink: only large replies of the bulk lane, one directly after another, change what is known of the
// link.
func TestWhatShowsTheLink(t *testing.T) {
	const takes = 5 * time.Millisecond
	for _, test := range []struct {
		name  string
		sizes []int
		slow  bool
	}{
		{"one reply", []int{linkReply}, false},
		{"large replies", []int{linkReply, linkReply}, true},
		{"small replies", []int{4096, 4096, 4096}, false},
		{"large and small ones in turn", []int{linkReply, 4096, linkReply, 0, linkReply}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var l link
			s := pacedStream{messageStream: still{takes}, link: &l}
			for _, size := range test.sizes {
				if err := s.Recv(&pagewire.Request{}); err != nil {
					t.Fatal(err)
				}
				if err := s.Send(&pagewire.Reply{Data: make([]byte, size)}); err != nil {
					t.Fatal(err)
				}
			}
			if got := l.cost(); got > copying != test.slow {
				t.Errorf("%.2f ns a byte", got)
			}
		})
	}
}
