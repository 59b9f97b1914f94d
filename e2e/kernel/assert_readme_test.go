// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the table of kernel/README.md instead of comparing with it")

const readme = "../../kernel/README.md"

// The table in kernel/README.md is between these two lines.
const (
	tableBegin = "<!-- The table of e2e/kernel/assert_table_test.go; " +
		"after a change: go test ./e2e/kernel -run TestReadme -update -->\n"
	tableEnd = "<!-- The end of the table. -->\n"
)

// kernel/README.md shows the present table.
func TestReadme(t *testing.T) {
	data, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begun := strings.Cut(string(data), tableBegin)
	old, after, ended := strings.Cut(rest, tableEnd)
	if !begun || !ended {
		t.Fatalf("%s has no place for the table: it stands between the lines\n%s%s", readme, tableBegin, tableEnd)
	}
	if *update {
		text := before + tableBegin + markdown() + tableEnd + after
		if err := os.WriteFile(readme, []byte(text), 0o644); err != nil { //nolint:gosec // others can read it in a checkout
			t.Fatal(err)
		}
		return
	}
	if old != markdown() {
		t.Errorf("%s is out of date: go test ./e2e/kernel -run TestReadme -update", readme)
	}
}

// markdown returns the table, with a row for each assertion under its point.
func markdown() string {
	var b strings.Builder
	b.WriteString("\n| | test |")
	for _, version := range Versions {
		fmt.Fprintf(&b, " stock %s | patched %[1]s |", version)
	}
	b.WriteString("\n|---|---|---|---|---|---|\n")
	for _, p := range allPoints() {
		fmt.Fprintf(&b, "| **%s** | | | | | |\n", p.title)
		for _, a := range p.assertions {
			fmt.Fprintf(&b, "| %s | `%s` |", a.shows, a.name)
			for _, version := range Versions {
				for _, v := range []Variant{Stock, Patched} {
					fmt.Fprintf(&b, " %s |", cmp.Or(a.expected(version, v), "not asked"))
				}
			}
			b.WriteString("\n")
		}
	}
	b.WriteString("\n")
	return b.String()
}
