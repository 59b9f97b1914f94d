// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestPIDFile checks that QEMU writes the pidfile of its command line, and that Kill removes it.
func TestPIDFile(t *testing.T) {
	opts := qemutest.Options(t, qemutest.Self(), "-pidfile", "vm.pid")
	path := filepath.Join(opts.Dir, "vm.pid")
	p, _ := qemutest.StartWith(t, nil, opts)
	if text, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(text)) != strconv.Itoa(p.Pid()) {
		t.Fatalf("the file of process %d is %q, %v", p.Pid(), text, err)
	}
	if err := p.Kill(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file of a QEMU that was killed: %v", err)
	}
	// The file of another QEMU stays.
	if err := errors.Join(os.WriteFile(path, []byte("1\n"), 0o600), launch.RemovePIDFile(path, p.Pid())); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}
