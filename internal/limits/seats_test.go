// SPDX-License-Identifier: Apache-2.0

package limits

import "testing"

func TestSeats(t *testing.T) {
	s := NewSeats(3, 2)
	first, err := s.Take("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Take("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Take("a"); err == nil {
		t.Error("a caller has more than may be of one")
	}
	if _, err := s.Take("b"); err != nil {
		t.Errorf("another caller has none: %v", err)
	}
	if _, err := s.Take("c"); err == nil {
		t.Error("there are more than may be")
	}
	first()
	first() // gives one back, not two
	if _, err := s.Take("c"); err != nil {
		t.Errorf("the one that was given back: %v", err)
	}
	if _, err := s.Take("a"); err == nil {
		t.Error("one was given back twice")
	}
}
