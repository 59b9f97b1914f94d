// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"io"
	"os"
	"strings"
	"testing"
)

// TestPageSaysWhatCommandsSay: the page warns of the same dangers as the help texts of the commands.
func TestPageSaysWhatCommandsSay(t *testing.T) {
	text, err := os.ReadFile("../../internal/web/page/words.json")
	if err != nil {
		t.Fatal(err)
	}
	var words map[string]struct {
		Text             []string
		Sure, Ask, Field string
		Danger           bool
	}
	if err := json.Unmarshal(text, &words); err != nil {
		t.Fatal(err)
	}
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if len(words) < 6 {
		t.Errorf("only %d actions", len(words))
	}
	for name, w := range words {
		for _, node := range parser.Model.Children {
			if node.Name != name {
				continue
			}
			for _, paragraph := range w.Text {
				if !strings.Contains(node.Detail, paragraph) {
					t.Errorf("the help of %s does not say: %s", name, paragraph)
				}
			}
			all := node.Detail
			for _, flag := range node.Flags {
				all += "\n" + flag.Help
				// A required flag is a confirmation, and the page asks for the same.
				field := strings.ReplaceAll(flag.Name, "-", "")
				if flag.Required && (w.Sure != flag.Help || !w.Danger || !strings.EqualFold(w.Field, field)) {
					t.Errorf("%s wants --%s (%s), the page %q (%s)", name, flag.Name, flag.Help, w.Field, w.Sure)
				}
			}
			for _, positional := range node.Positional {
				all += "\n" + positional.Help
			}
			if !strings.Contains(all, w.Ask) || !strings.Contains(all, w.Sure) {
				t.Errorf("%s does not ask %q, or say %q", name, w.Ask, w.Sure)
			}
			delete(words, name)
		}
	}
	for name := range words {
		t.Errorf("there is no command %s", name)
	}
}
