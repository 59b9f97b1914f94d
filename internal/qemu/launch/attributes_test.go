// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"io/fs"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestAttributes checks that a QEMU of another user gets the given attributes, according to the kernel. They apply
// before QEMU creates its sockets. The starting process keeps its own attributes.
func TestAttributes(t *testing.T) {
	qemutest.NeedRoot(t)
	opts := qemutest.Options(t, qemutest.Unprivileged)
	want := process.Attributes{OOMScoreAdj: 250, Umask: 0o027}
	opts.Attributes = &want
	_, vm := qemutest.StartWith(t, newStarter(t, qemutest.Binary(t)), opts)
	f, err := vm.Facts(qemutest.Context(t))
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
