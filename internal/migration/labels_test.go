// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"strings"
	"testing"
)

func TestLabels(t *testing.T) {
	many := make(map[string]string)
	for i := range mostLabels {
		many[fmt.Sprint(i)] = ""
	}
	for _, good := range []map[string]string{
		nil, many, {"example.org/team_a-1": "Größe: 3 × 4"}, {strings.Repeat("k", 63): strings.Repeat("v", longestValue)},
	} {
		if err := CheckLabels(good); err != nil {
			t.Error(err)
		}
	}
	more := map[string]string{"one": "more"}
	for k, v := range many {
		more[k] = v
	}
	for name, bad := range map[string]map[string]string{
		"too many": more, "no key": {"": "v"}, "a long key": {strings.Repeat("k", 64): "v"},
		"a key with a space": {"a b": "v"}, "a key of several lines": {"a\n": "v"},
		"a long value": {"k": strings.Repeat("v", longestValue+1)}, "a value that repaints": {"k": "\x1b[2J"},
		"several lines": {"k": "a\nb"}, "no text": {"k": "\xff"},
	} {
		if err := CheckLabels(bad); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}
