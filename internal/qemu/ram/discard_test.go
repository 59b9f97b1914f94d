// SPDX-License-Identifier: Apache-2.0

package ram_test

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestKeepWhenQEMUEnds: a QEMU with discard-data=on empties its memory's file when it ends, unless KeepWhenQEMUEnds has
// switched that off. DiscardWhenQEMUEnds switches it on again.
func TestKeepWhenQEMUEnds(t *testing.T) {
	for name, c := range map[string]struct{ keep, again, empties bool }{
		"as it is":     {empties: true},
		"kept":         {keep: true},
		"and kept not": {keep: true, again: true, empties: true},
	} {
		t.Run(name, func(t *testing.T) {
			path := qemutest.RAMFile(t)
			file := func(id, path, more string) string {
				return fmt.Sprintf("memory-backend-file,id=%s,size=32M,share=on,mem-path=%s%s", id, path, more)
			}
			p, vm := qemutest.Start(t, "-m", "32M,slots=2,maxmem=1G", "-machine", "memory-backend=ram0",
				"-object", file("ram0", path, ",discard-data=on"), "-object", file("other", qemutest.RAMFile(t), ""))
			ctx := qemutest.Context(t)
			var changed []string
			if c.keep {
				var err error
				if changed, err = vm.RAM.KeepWhenQEMUEnds(ctx); err != nil || !slices.Equal(changed, []string{"ram0"}) {
					t.Fatalf("changed %v, %v", changed, err)
				}
			}
			if c.again {
				if err := vm.RAM.DiscardWhenQEMUEnds(ctx, changed); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Kill(vm.Pid, unix.SIGTERM); err != nil { // as virsh destroy does
				t.Fatal(err)
			}
			<-p.Exited()
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if empty := st.Blocks == 0; empty != c.empties {
				t.Errorf("the file has %d blocks", st.Blocks)
			}
			_ = os.Remove(path)
		})
	}
}
