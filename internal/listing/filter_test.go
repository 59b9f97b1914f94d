// SPDX-License-Identifier: Apache-2.0

package listing

import (
	"strings"
	"testing"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestFilters(t *testing.T) {
	for name, bad := range map[string]*migratedv1.MigrationFilter{
		"a role that is none": {Role: 7}, "a key that is none": {Labels: map[string]string{"a b": "1"}},
	} {
		if _, err := NewFilter(bad); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	h := newHost()
	want, err := NewFilter(&migratedv1.MigrationFilter{UnderWay: true, Labels: map[string]string{"a": ""}})
	if err != nil {
		t.Fatal(err)
	}
	w := h.watch(want)
	h.add(1, nil) // lacks the label, which is not the same as an empty label
	v := h.add(1, map[string]string{"a": ""})
	v.to(completed)
	v.entry.Refresh()
	v.moves()
	h.passes(time.Second)
	v.entry.Refresh()
	v.entry.Remove()
	if err := w.catchUp(h); err != nil {
		t.Fatal(err)
	}
	if len(w.states) != 2 || len(w.has) != 0 || !strings.Contains(w.states[1], "COMPLETED") {
		t.Errorf("it was told of %q, and has %v", w.states, w.has)
	}
}
