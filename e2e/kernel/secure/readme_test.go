// SPDX-License-Identifier: Apache-2.0

package secure

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the table of README.md instead of comparing with it")

// tableStart is the first line of the table in README.md. The table goes on to the end of the file.
const tableStart = "| claim | | stock | patched |\n"

// README.md shows the present claims.
func TestReadme(t *testing.T) {
	const readme = "README.md"
	have, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	text, _, found := strings.Cut(string(have), tableStart)
	if !found {
		t.Fatalf("%s has no line %q", readme, tableStart)
	}
	var want strings.Builder
	want.WriteString(text + tableStart + "|---|---|---|---|\n")
	for _, c := range claims {
		fmt.Fprintf(&want, "| `%s` | %s | %s | %s |\n", c.name, c.shows, c.stock, c.patched)
	}
	if *update {
		if err := os.WriteFile(readme, []byte(want.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), string(have)); diff != "" {
		t.Errorf("go test ./e2e/kernel/secure -run TestReadme -update (-want +have):\n%s", diff)
	}
}
