// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestPIDFile: a started QEMU writes the file that its command line names, and when it is killed it does not stay.
func TestPIDFile(t *testing.T) {
	opts := startOptions(t, Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, "-pidfile", "vm.pid")
	path := filepath.Join(opts.Dir, "vm.pid")
	p, _ := startWith(t, nil, opts)
	if text, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(text)) != strconv.Itoa(p.Pid()) {
		t.Fatalf("the file of process %d is %q, %v", p.Pid(), text, err)
	}
	if err := p.Kill(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file of a QEMU that was killed: %v", err)
	}
	// Another QEMU's stays.
	if err := errors.Join(os.WriteFile(path, []byte("1\n"), 0o600), removePIDFile(path, p.Pid())); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}
