// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"os"
	"testing"
)

// FuzzParse: parse accepts a file, or returns a list of mistakes, each with a text.
func FuzzParse(f *testing.F) {
	example, err := os.ReadFile("../../deploy/migrated.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		string(example), "", "---\n", "listen: [a]\n", "peers: [a: b]\n", "fault_workers: &a 1\nlog_level: *a\n",
		"? [x]\n: y\n", "\xff", "listen: a\nlisten: b\n", "plaintext: maybe\n", "- a\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := parse("m.yaml", data)
		if err == nil {
			_ = cfg.Validate()
			return
		}
		var one *FileError
		if errors.As(err, &one) && one.Text == "" || err.Error() == "" {
			t.Errorf("a mistake without words: %#v", err)
		}
	})
}
