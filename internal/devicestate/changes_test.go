// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func parsed(t testing.TB, sections ...[]byte) []Section {
	t.Helper()
	s, err := Parse(saved(sections...))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func never(int) bool { return false }

func TestChanges(t *testing.T) {
	long := strings.Repeat("0123456789", 5000)
	early := parsed(t, section(1, "same", 0, long), section(2, "twin", 0, long), section(3, "twin", 0, long),
		section(4, "reader", 0, long))
	busy := []byte(long)
	busy[0], busy[3], busy[9], busy[len(busy)-1] = 'a', 'b', 'c', 'd'
	now := parsed(t, section(1, "same", 0, long), section(2, "twin", 0, long), section(3, "twin", 0, string(busy)),
		section(4, "reader", 0, long), section(9, "plugged", 0, "in"))
	changes, err := Changes(early, now, func(i int) bool { return early[i].Name == "reader" })
	if err != nil {
		t.Fatal(err)
	}
	if len(changes) > 150 {
		t.Errorf("a few bytes and two small sections have become %d bytes", len(changes))
	}
	untouched := slices.Clone(early)
	got, err := ParseChanges(early, changes)
	if err != nil {
		t.Fatal(err)
	}
	want := []Change{{2, now[2]}, {3, now[3]}, {-1, now[4]}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("changed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(now, Merge(early, got)); diff != "" {
		t.Errorf("merged (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(untouched, early); diff != "" {
		t.Errorf("the earlier state has become another:\n%s", diff)
	}
}

// TestChangesOfForm: a section of another form cannot be loaded over the earlier one, because QEMU would keep a part of
// that.
func TestChangesOfForm(t *testing.T) {
	part := func(name string) string { return "\x05" + string(rune(len(name))) + name + "\x00\x00\x00\x01value" }
	was := section(1, "serial", 0, "fixed"+part("serial/tsr"))
	for name, now := range map[string][]byte{
		"longer":        section(1, "serial", 0, "fixed+"+part("serial/tsr")),
		"a part less":   section(1, "serial", 0, "fixed"),
		"another part":  section(1, "serial", 0, "fixed"+part("serial/rsr")),
		"another place": section(1, "serial", 1, "fixed"+part("serial/tsr")),
	} {
		if _, err := Changes(parsed(t, was), parsed(t, now), never); !errors.Is(err, ErrOtherForm) {
			t.Errorf("%s: %v", name, err)
		}
	}
	now := parsed(t, section(1, "serial", 0, "FIXED"+part("serial/tsr")))
	if _, err := Changes(parsed(t, was), now, never); err != nil {
		t.Error(err)
	}
}

func FuzzParseChanges(f *testing.F) {
	early := parsed(f, section(1, "a", 0, strings.Repeat("x", 99)), section(2, "b", 1, "12345678"))
	now := parsed(f, section(1, "a", 0, strings.Repeat("x", 50)+"y"+strings.Repeat("x", 48)),
		section(2, "b", 1, "12X45678"), section(3, "c", 0, "new"))
	changes, err := Changes(early, now, never)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(changes)
	f.Add([]byte{1, 3, 90, 20})
	f.Fuzz(func(t *testing.T, changes []byte) {
		list, err := ParseChanges(early, changes)
		if err != nil {
			if !errors.Is(err, ErrChanges) {
				t.Fatal(err)
			}
			return
		}
		for _, c := range list {
			if s, err := parseWhole(c.Bytes); err != nil || s.Name != c.Name {
				t.Fatalf("%+v: %v", c, err)
			}
		}
		if len(Merge(early, list)) < len(early) {
			t.Fatal("sections were lost")
		}
	})
}

// FuzzDifference: the pieces between two states of the same length turn the one into the other.
func FuzzDifference(f *testing.F) {
	f.Add([]byte("abcdefgh"), []byte("abXdefgY"))
	f.Add([]byte("a"), []byte("bc"))
	f.Fuzz(func(t *testing.T, was, is []byte) {
		if len(was) != len(is) {
			return
		}
		r := changesReader{rest: appendDifference(nil, was, is)}
		if got := r.replacePieces(was); r.err != nil || !bytes.Equal(got, is) || len(r.rest) != 0 {
			t.Fatalf("%q became %q, read as %q: %v", was, is, got, r.err)
		}
	})
}

func TestEarly(t *testing.T) {
	all := parsed(t, section(1, "0000:00:02.0:00.0/virtio-net", 0, ""), section(2, "0000:00:1f.0/ICH9LPC", 0, ""),
		section(3, "PCIHost", 0, ""), section(4, "pflash_cfi01", 0, ""), section(5, "0000:00:03.0/flux-capacitor", 0, ""))
	if early, err := Early(all); err != nil || len(early) != 3 || early[2].Name != "PCIHost" {
		t.Error(early, err)
	}
	if Remaps([]Change{{0, all[0]}, {2, all[2]}}) || !Remaps([]Change{{0, all[0]}, {1, all[1]}}) ||
		Remaps([]Change{{-1, all[1]}}) {
		t.Error("only an LPC bridge that was loaded before is mapped again")
	}
	if hosts := Hosts(all); len(hosts) != 1 || hosts[0].Name != "PCIHost" {
		t.Errorf("hosts %v", hosts)
	}
}
