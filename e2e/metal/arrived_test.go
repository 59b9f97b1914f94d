// SPDX-License-Identifier: Apache-2.0

package metal

import (
	"bytes"
	"errors"
	"testing"
)

func TestArrived(t *testing.T) {
	whole := func() []byte { return counted(t, 7, 0x900000) }
	for name, c := range map[string]struct {
		pass uint32
		ram  []byte
		ok   bool
	}{
		"all that was written":   {6, whole(), true},
		"not the newest pass":    {7, whole(), false},
		"a page that never came": {6, func() []byte { r := whole(); clear(r[0x600000:0x601000]); return r }(), false},
		"a page in another place": {
			6, func() []byte { r := whole(); copy(r[0x600000:0x601000], r[0x800000:0x801000]); return r }(), false,
		},
		"everything is missing": {1, make([]byte, ramMiB<<20), false},
	} {
		err := arrived(bytes.NewReader(c.ram), int64(len(c.ram)), c.pass)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Arrived("/no/such/file", 1); err == nil {
		t.Error("no RAM, no error")
	}
}
