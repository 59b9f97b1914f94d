// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"io/fs"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestAttributes: a started QEMU of another user has what it was to be given, by the kernel's word, from its beginning
// as far as its sockets go; and who starts it has what it had.
func TestAttributes(t *testing.T) {
	needRoot(t)
	opts := startOptions(t, unprivileged)
	want := Attributes{OOMScoreAdj: 250, Umask: 0o027}
	opts.Attributes = &want
	_, vm := startWith(t, newStarter(t, qemuBinary(t)), opts)
	f, err := vm.Facts(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, f.Attributes); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if info, err := os.Stat(opts.QMPPath); err != nil || info.Mode().Perm() != fs.FileMode(0o777&^0o027) {
		t.Errorf("its socket: %v, %v", info.Mode(), err)
	}
	if oom, err := os.ReadFile("/proc/self/oom_score_adj"); err != nil || string(oom) == "250\n" {
		t.Errorf("this process has %q, %v", oom, err)
	}
}
