// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"errors"
	"strings"
	"testing"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
	"pgregory.net/rapid"
)

const (
	page = 4 << 10
	huge = 2 << 20
	mib  = 1 << 20
)

func anyHost(string) error { return nil }

func placerOf(rooms map[string]uint64, order ...string) *placer {
	p := newPlacer(page)
	for _, address := range order {
		p.addHost(address, &migratedv1.HostRoom{Memory: rooms[address]})
	}
	return p
}

func TestPlaceTakesTheEmptiest(t *testing.T) {
	p := placerOf(map[string]uint64{"b": 1000 * mib, "c": 1500 * mib}, "b", "c")
	for i, want := range []string{"c", "b", "c", "b"} {
		vm := string(rune('1' + i))
		host, err := p.place(vm, Needs{page: 600 * mib}, anyHost)
		if i == 3 {
			if !errors.Is(err, errNoHost) || !strings.Contains(err.Error(), "600 MiB are needed, and 300 MiB are left") {
				t.Errorf("a fourth VM: %q, %v", host, err)
			}
			continue
		}
		if err != nil || host != want {
			t.Errorf("VM %s goes to %q, not to %s: %v", vm, host, want, err)
		}
	}
}

func TestPlaceKeepsApart(t *testing.T) {
	p := placerOf(map[string]uint64{"b": 4000 * mib, "c": 1000 * mib}, "b", "c")
	p.keepApart([]string{"db", "standby", "witness"})
	needs := Needs{page: 100 * mib}
	for vm, want := range map[string]string{"db": "b"} {
		if host, err := p.place(vm, needs, anyHost); err != nil || host != want {
			t.Fatalf("%s: %q, %v", vm, host, err)
		}
	}
	if host, err := p.place("standby", needs, anyHost); err != nil || host != "c" {
		t.Errorf("standby: %q, %v", host, err)
	}
	host, err := p.place("witness", needs, anyHost)
	if err == nil || !strings.Contains(err.Error(), "the host of another VM (db)") {
		t.Errorf("a third of two hosts: %q, %v", host, err)
	}
	p.remove("db", needs)
	if host, err := p.place("witness", needs, anyHost); err != nil || host != "b" {
		t.Errorf("when one has left: %q, %v", host, err)
	}
}

func TestPlaceHugePages(t *testing.T) {
	p := newPlacer(page)
	p.addHost("b", &migratedv1.HostRoom{
		Memory: 9000 * mib, HugePages: []*migratedv1.HugePages{{PageSize: huge, Free: 100 * mib}},
	})
	p.addHost("c", &migratedv1.HostRoom{
		Memory: 100 * mib, HugePages: []*migratedv1.HugePages{{PageSize: huge, Free: 300 * mib}},
	})
	if host, err := p.place("vm", Needs{page: 10 * mib, huge: 200 * mib}, anyHost); err != nil || host != "c" {
		t.Errorf("%q, %v", host, err)
	}
	_, err := p.place("other", Needs{page: 10 * mib, huge: 200 * mib}, anyHost)
	if err == nil || !strings.Contains(err.Error(),
		"b: not enough memory: 200 MiB in pages of 2048 KiB are needed, and 100 MiB are left") {
		t.Errorf("a second: %v", err)
	}
}

// TestPlaceUnknownRoom: a daemon of an older version does not say how much memory its host has left.
func TestPlaceUnknownRoom(t *testing.T) {
	p := newPlacer(page)
	p.addHost("old", nil)
	if host, err := p.place("vm", Needs{page: 1 << 40}, anyHost); err != nil || host != "old" {
		t.Errorf("%q, %v", host, err)
	}
}

// TestPlaceNeverOvercommits: after any sequence of place and remove, no host has more than its memory, and VMs
// that are to be apart are on different hosts.
func TestPlaceNeverOvercommits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rooms := map[string]uint64{
			"b": rapid.Uint64Range(0, 1000).Draw(t, "b"), "c": rapid.Uint64Range(0, 1000).Draw(t, "c"),
			"d": rapid.Uint64Range(0, 1000).Draw(t, "d"),
		}
		p := placerOf(rooms, "b", "c", "d")
		names := []string{"1", "2", "3", "4", "5", "6"}
		apart := rapid.SliceOfNDistinct(rapid.SampledFrom(names), 2, 4, rapid.ID[string]).Draw(t, "apart")
		p.keepApart(apart)
		hostOf, needs := make(map[string]string), make(map[string]Needs)
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			vm := rapid.SampledFrom(names).Draw(t, "vm")
			if hostOf[vm] != "" {
				p.remove(vm, needs[vm])
				delete(hostOf, vm)
				continue
			}
			needs[vm] = Needs{page: rapid.Uint64Range(1, 600).Draw(t, "needs")}
			if host, err := p.place(vm, needs[vm], anyHost); err == nil {
				hostOf[vm] = host
			}
			used := make(map[string]uint64)
			apartAt := make(map[string]string) // by host: its VM of those that are to be apart
			for one, host := range hostOf {
				used[host] += needs[one][page]
				for _, other := range apart {
					if one == other {
						if apartAt[host] != "" {
							t.Fatalf("%s and %s are both at %s", one, apartAt[host], host)
						}
						apartAt[host] = one
					}
				}
			}
			for host, bytes := range used {
				if bytes > rooms[host] {
					t.Fatalf("host %s of %d bytes is given %d", host, rooms[host], bytes)
				}
			}
		}
	})
}
