// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"os"
	"path/filepath"
	"testing"
)

// TestWhyLeases: the settings of qemu.conf with which libvirt takes leases.
func TestWhyLeases(t *testing.T) {
	path := filepath.Join(t.TempDir(), "qemu.conf")
	if err := whyLeases(path); err != nil {
		t.Errorf("without a file: %v", err)
	}
	for text, want := range map[string]bool{
		"":                                   false,
		"#lock_manager = \"lockd\"\n":        false,
		"lock_manager = \"nop\"\n":           false,
		"user = \"a\"\nlock_manager='lockd'": true,
		"  lock_manager = \"sanlock\" # x\n": true,
		"lock_manager = \"\"\"lockd\"\"\"":   true,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := whyLeases(path); (err != nil) != want {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := whyLeases(t.TempDir()); err == nil {
		t.Error("what cannot be read is taken for a file without the setting")
	}
}
