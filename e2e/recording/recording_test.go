// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestScreen plays the output of mpb: two lines that are drawn again in place.
func TestScreen(t *testing.T) {
	s := newScreen(20)
	s.prompt("migrated", []string{"list"})
	for _, step := range []struct {
		at   time.Duration
		text string
	}{
		{0, "a\r\n  b <µ"},
		{time.Second, ">\r\n\x1b"},
		{time.Second, "[2A\x1b[Jcc\r\n  d\x1b[K\r\n"},
		{time.Second + time.Millisecond, "\x1b[1A\r\x1b[J  e\n"},
		{2 * time.Second, "one two three four five\r\n"},
	} {
		if err := s.write(step.at, []byte(step.text)); err != nil {
			t.Fatal(err)
		}
	}
	s.ends(2 * time.Second)
	var got []string
	for _, r := range s.rows {
		var texts []string
		for _, v := range r.versions {
			texts = append(texts, v.text)
		}
		got = append(got, strings.Join(texts, "|"))
	}
	if diff := cmp.Diff([]string{"migrated list", "a|cc", "  b <µ|  e", "one two three four f", "ive"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	picture, err := s.svg()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"<title", "<desc", "# migrated list\ncc\n  e\none two", "prefers-color-scheme", "prefers-reduced-motion", ">b &lt;µ<",
	} {
		if !strings.Contains(string(picture), want) {
			t.Errorf("the picture lacks %q:\n%s", want, picture)
		}
	}
	decoder := xml.NewDecoder(strings.NewReader(string(picture)))
	for {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for _, unknown := range []string{"\x1b[2;3H", "\x1bc", "\x1b[xA"} {
		if err := newScreen(20).write(0, []byte(unknown)); err == nil {
			t.Errorf("%q is understood", unknown)
		}
	}
}
