// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

// object is the JSON of a valid mapping, with old replaced.
func object(old, replacement string) string {
	return strings.Replace(
		`{"base_host_virt_addr":16777216,"size":2097152,"offset":4194304,"page_size":4096,"page_size_kib":4096}`,
		old, replacement, 1,
	)
}

func TestDecode(t *testing.T) {
	want := Mapping{BaseHostVirtAddr: 16 << 20, Size: 2 << 20, Offset: 4 << 20, PageSize: 4096}
	for name, text := range map[string]string{
		"both names": object("", ""),
		"old name":   object(`"page_size":4096,`, ""),
		"new name":   object(`,"page_size_kib":4096`, ""),
		"spaces":     " " + object(":", " :\n\t"),
	} {
		got, err := decode([]byte("[" + text + "]"))
		if err != nil || !slices.Equal(got, []Mapping{want}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	got, err := decode([]byte("[" + object("4096", "2097152") + "]"))
	if err == nil {
		t.Errorf("sizes that differ: %+v", got)
	}
	huge := strings.ReplaceAll(object("", ""), ":4096", ":2097152")
	if got, err := decode([]byte("[" + huge + "]")); err != nil || got[0].PageSize != 2<<20 {
		t.Errorf("huge pages: %+v, %v", got, err)
	}
}

func TestDecodeErrors(t *testing.T) {
	next := func(addr, offset string) string { // a second mapping
		return strings.Replace(object("16777216", addr), "4194304", offset, 1)
	}
	for name, tt := range map[string]struct{ text, says string }{
		"empty":               {"", "EOF"},
		"no mappings":         {"[]", "no mappings"},
		"null":                {"null", "belongs"},
		"object":              {object("", ""), "belongs"},
		"array of numbers":    {"[1]", "belongs"},
		"array of null":       {"[null]", "belongs"},
		"array of arrays":     {"[[]]", "belongs"},
		"cut off":             {"[" + object("", ""), "EOF"},
		"trailing":            {"[" + object("", "") + "] 1", "follows"},
		"trailing comma":      {"[" + object("", "") + ",]", "mapping 1"},
		"string for a number": {"[" + object(":4096", `:"4096"`) + "]", "not a number"},
		"null for a number":   {"[" + object(":4096", ":null") + "]", "not a number"},
		"array for a number":  {"[" + object(":4096", ":[4096]") + "]", "not a number"},
		"negative":            {"[" + object("16777216", "-4096") + "]", "not an integer"},
		"fraction":            {"[" + object("16777216", "16777216.0") + "]", "not an integer"},
		"exponent":            {"[" + object("16777216", "1e9") + "]", "not an integer"},
		"more than 64 bits":   {"[" + object("16777216", "18446744073709551616") + "]", "not an integer"},
		"unknown field":       {"[" + object(`"size"`, `"flags":0,"size"`) + "]", `unknown field "flags"`},
		"other case":          {"[" + object(`"size"`, `"Size"`) + "]", `unknown field "Size"`},
		"twice":               {"[" + object(`"size"`, `"size":4096,"size"`) + "]", "size occurs twice"},
		"no address": {
			"[" + object(`"base_host_virt_addr":16777216,`, "") + "]", "base_host_virt_addr is missing",
		},
		"no size":           {"[" + object(`"size":2097152,`, "") + "]", "size is missing"},
		"no offset":         {"[" + object(`"offset":4194304,`, "") + "]", "offset is missing"},
		"no page size":      {`[{"base_host_virt_addr":0,"size":4096,"offset":0}]`, "page_size is missing"},
		"page sizes differ": {"[" + object(`"page_size":4096`, `"page_size":8192`) + "]", "differ"},
		"page size in KiB":  {"[" + object(`_kib":4096`, `_kib":4`) + "]", "differ"},
		"page size 0":       {"[" + strings.ReplaceAll(object("", ""), ":4096", ":0") + "]", "power of two"},
		"page size 1":       {"[" + strings.ReplaceAll(object("", ""), ":4096", ":1") + "]", "power of two"},
		"page size 12288":   {"[" + strings.ReplaceAll(object("", ""), ":4096", ":12288") + "]", "power of two"},
		"page size 2^63": {
			"[" + strings.ReplaceAll(object("", ""), ":4096", ":9223372036854775808") + "]", "power of two",
		},
		"size 0":             {"[" + object("2097152", "0") + "]", "size 0"},
		"misaligned address": {"[" + object("16777216", "16777217") + "]", "multiple"},
		"misaligned size":    {"[" + object("2097152", "2097153") + "]", "multiple"},
		"misaligned offset":  {"[" + object("4194304", "4194305") + "]", "multiple"},
		"not of huge pages": {
			"[" + strings.ReplaceAll(object("2097152", "4096"), `":4096}`, `":2097152}`) + "]", "differ",
		},
		"address overflows":  {"[" + object("16777216", "18446744073709547520") + "]", "overflows"},
		"address plus size":  {"[" + object("16777216", "9223372036854771712") + "]", "overflows"},
		"size overflows":     {"[" + object("2097152", "18446744073709547520") + "]", "overflows"},
		"offset overflows":   {"[" + object("4194304", "18446744073709547520") + "]", "overflows"},
		"same mapping twice": {"[" + object("", "") + "," + object("", "") + "]", "overlap"},
		"addresses overlap": {
			"[" + object("", "") + "," + next("18870272", "0") + "]", "addresses of two mappings overlap",
		},
		"offsets overlap": {
			"[" + object("", "") + "," + next("0", "4198400") + "]", "offsets of two mappings overlap",
		},
		"invalid second mapping":   {"[" + object("", "") + "," + next("1", "0") + "]", "mapping 1"},
		"control character":        {"[\x00]", "invalid"},
		"key that is not a string": {"[{1:2}]", "invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := decode([]byte(tt.text))
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s: %+v, error %v, want %q", tt.text, got, err, tt.says)
			}
		})
	}
}

// FuzzDecode checks that decode never panics, that accepted mappings are valid and are the same after encode and
// decode, and that frame gives decode the same text, however the message is cut.
func FuzzDecode(f *testing.F) {
	f.Add([]byte("["+object("", "")+"]"), 7)
	f.Add([]byte(`[{"a\"]":1}]`), 4)
	f.Fuzz(func(t *testing.T, text []byte, cut int) {
		mappings, err := decode(text)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		if err := checkAll(mappings); err != nil {
			t.Errorf("accepted %+v: %v", mappings, err)
		}
		again, err := encode(mappings)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decode(again); err != nil || !slices.Equal(got, mappings) {
			t.Errorf("%+v became %+v, %v", mappings, got, err)
		}

		if len(text) > maxMessage {
			return
		}
		cut = max(0, min(cut, len(text)))
		var fr frame
		first, err := fr.add(text[:cut])
		if err != nil {
			t.Fatalf("framing refuses what decode accepts: %v", err)
		}
		last, err := fr.add(text[cut:])
		if err != nil || !last || !bytes.Equal(fr.text, text) {
			t.Errorf("cut at %d: complete %v then %v, %q, %v", cut, first, last, fr.text, err)
		}
	})
}
