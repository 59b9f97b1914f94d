// SPDX-License-Identifier: Apache-2.0

package listing

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestPagesAreStable: a migration that is in the list all the while is on exactly one page, even if others are added
// and removed between the pages. The pages and the events after their version together give the list.
func TestPagesAreStable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := newHost()
		var vms []*vm
		for range rapid.IntRange(1, 12).Draw(t, "migrations") {
			vms = append(vms, h.add(1, nil))
			h.passes(time.Duration(rapid.IntRange(0, 1).Draw(t, "s")) * time.Second) // several at once, too
		}
		gone := make(map[string]bool)
		w := &watcher{has: make(map[string]*migratedv1.Migration)}
		size := uint32(rapid.IntRange(1, 5).Draw(t, "size"))
		for token, pages := "", 0; pages == 0 || token != ""; pages++ {
			page, err := h.Page(Filter{}, size, token)
			if err != nil {
				t.Fatal(err)
			}
			if len(page.GetMigrations()) > int(size) {
				t.Fatalf("%d are on a page", len(page.GetMigrations()))
			}
			for _, m := range page.GetMigrations() {
				if w.has[key(m)] != nil {
					t.Fatalf("%s is on two pages", m.GetId())
				}
				w.has[key(m)] = m
			}
			version, err := h.Parse(page.GetResourceVersion())
			if err != nil || pages > 0 && version != w.version {
				t.Fatalf("page %d has the version %d, the one before %d; %v", pages, version, w.version, err)
			}
			w.version, token = version, page.GetNextPageToken()
			for range rapid.IntRange(0, 2).Draw(t, "come and go") {
				h.add(1, nil)
				if v := vms[rapid.IntRange(0, len(vms)-1).Draw(t, "goes")]; rapid.Bool().Draw(t, "it goes") {
					v.entry.Remove()
					gone[key(v.is)] = true
				}
			}
		}
		for _, v := range vms {
			if !gone[key(v.is)] && w.has[key(v.is)] == nil {
				t.Fatalf("%s is on no page", v.is.GetId())
			}
		}
		events, _, err := h.After(w.version)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events { // they may be about migrations that are on a later page
			if delete(w.has, key(e.View)); e.What != removed {
				w.has[key(e.View)] = e.View
			}
		}
		if err := w.is(h); err != nil {
			t.Fatal(err)
		}
	})
}

// TestPagesFitIntoMessages: clients take 4 MiB.
func TestPagesFitIntoMessages(t *testing.T) {
	h := newHost()
	labels := make(map[string]string)
	for i := range 32 {
		labels[fmt.Sprintf("%063d", i)] = strings.Repeat("x", 256)
	}
	for range 1000 {
		h.add(1, labels)
	}
	n := 0
	for token, first := "", true; first || token != ""; first = false {
		page, err := h.Page(Filter{}, 0, token)
		if err != nil {
			t.Fatal(err)
		}
		if size := proto.Size(page); size > 4<<20 {
			t.Fatalf("a page has %d bytes", size)
		}
		n += len(page.GetMigrations())
		token = page.GetNextPageToken()
	}
	if n != 1000 {
		t.Errorf("%d migrations are on the pages", n)
	}
}
