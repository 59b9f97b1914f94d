// SPDX-License-Identifier: Apache-2.0

package version

import (
	"errors"
	"testing"
)

func TestAgreeOnProtocol(t *testing.T) {
	for name, c := range map[string]struct{ oldest, newest, agreed uint32 }{
		"the same":          {OldestToBegin, Protocol, Protocol},
		"newer":             {OldestToBegin, Protocol + 1, Protocol},
		"newer, but not us": {Protocol + 1, Protocol + 2, 0},
		"too old":           {0, OldestToBegin - 1, 0},
		"says nothing":      {0, 0, 0},
		"upside down":       {Protocol + 1, Protocol, 0},
	} {
		t.Run(name, func(t *testing.T) {
			agreed, err := AgreeOnProtocol("the source", c.oldest, c.newest)
			if agreed != c.agreed {
				t.Errorf("%d, want %d", agreed, c.agreed)
			}
			var unknown *Error
			if (c.agreed == 0) != errors.As(err, &unknown) {
				t.Error(err)
			} else if unknown != nil {
				t.Log(err)
			}
		})
	}
}

func TestCheckProtocol(t *testing.T) {
	for v := uint32(OldestProtocol - 1); v <= Protocol+1; v++ {
		known := v >= OldestProtocol && v <= Protocol
		err := CheckProtocol("a migration", v)
		var unknown *Error
		if (err == nil) != known || !known && !errors.As(err, &unknown) {
			t.Errorf("version %d: %v", v, err)
		}
	}
}

func TestCheckState(t *testing.T) {
	for v := uint32(OldestState - 1); v <= State+1; v++ {
		known := v >= OldestState && v <= State
		err := CheckState("a file", v)
		var unknown *Error
		if (err == nil) != known || !known && !errors.As(err, &unknown) {
			t.Errorf("version %d: %v", v, err)
		}
	}
}
