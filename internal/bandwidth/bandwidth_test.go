// SPDX-License-Identifier: Apache-2.0

package bandwidth

import (
	"errors"
	"testing"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]uint64{
		"500M": 500 << 20, "500m": 500 << 20, "1.5G": 3 << 29, "64K": 64 << 10, "2T": 2 << 40, "65536": 65536,
		"none": 0, "0": 0, "0M": 0,
	} {
		if got, err := Parse(text); got != want || err != nil {
			t.Errorf("%q is %d, %v, want %d", text, got, err, want)
		}
	}
	for text, want := range map[string]error{
		"": ErrSyntax, "M": ErrSyntax, "fast": ErrSyntax, "500Mbit": ErrSyntax, "500MB": ErrSyntax, "500 M": ErrSyntax,
		"-1M": ErrSyntax, "1e9": ErrSyntax, "0x10M": ErrSyntax, "inf": ErrSyntax, "NaN": ErrSyntax, "1.2.3M": ErrSyntax,
		"9000000T": ErrSyntax, "500": ErrTooLow, "63K": ErrTooLow, "0.1": ErrTooLow,
	} {
		if got, err := Parse(text); !errors.Is(err, want) {
			t.Errorf("%q is %d, %v, want %v", text, got, err, want)
		}
	}
}

func TestLower(t *testing.T) {
	for _, c := range [][3]uint64{{0, 0, 0}, {0, 5, 5}, {5, 0, 5}, {4, 5, 4}, {5, 4, 4}} {
		if got := Lower(c[0], c[1]); got != c[2] {
			t.Errorf("the lower of %d and %d is %d", c[0], c[1], got)
		}
	}
}
