// SPDX-License-Identifier: Apache-2.0

package ram_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
)

// TestCheckAlone checks that another process that maps the VM's memory is found, for each kind of memory, and that the
// error names it and a remedy.
func TestCheckAlone(t *testing.T) {
	removed := qemutest.RAMFile(t)
	for _, test := range []struct {
		name string
		args []string
	}{
		{"file", qemutest.RAM(qemutest.RAMFile(t))},
		{"removed file", qemutest.RAM(removed)},
		{"memfd", []string{
			"-m", "64", "-object", "memory-backend-memfd,id=ram0,size=64M", "-machine", "memory-backend=ram0",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := qemutest.Start(t, append(test.args, "-S")...)
			if test.name == "removed file" {
				if err := os.Remove(removed); err != nil {
					t.Fatal(err)
				}
			}
			blocks, err := vm.RAM.Blocks(qemutest.Context(t))
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(blocks, func(b ram.Block) bool { return b.ID == "ram0" })
			if err := vm.RAM.CheckAlone(blocks); err != nil {
				t.Fatal(err)
			}
			file, err := os.Open(blocks[at].Path)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			for _, kind := range []int{unix.MAP_SHARED, unix.MAP_PRIVATE} {
				mapped, err := unix.Mmap(int(file.Fd()), 32<<20, 4096, unix.PROT_READ, kind)
				if err != nil {
					t.Fatal(err)
				}
				var bad *ram.Error
				err = vm.RAM.CheckAlone(blocks)
				if !errors.As(err, &bad) || bad.ID != "ram0" || bad.Remedy == "" ||
					!strings.Contains(bad.Reason, fmt.Sprintf("process %d (ram.test)", os.Getpid())) ||
					!strings.Contains(bad.Reason, blocks[at].File) {
					t.Errorf("error %v", err)
				}
				found := find(check.VM(qemutest.Context(t), vm), `RAM "ram0"`)
				if len(found) != 1 || found[0].Status != check.Failed {
					t.Errorf("check says %+v", found)
				}
				if err := unix.Munmap(mapped); err != nil {
					t.Fatal(err)
				}
			}
			if err := vm.RAM.CheckAlone(blocks); err != nil {
				t.Error(err)
			}
		})
	}
}

func find(results []check.Result, subject string) []check.Result {
	return slices.DeleteFunc(results, func(r check.Result) bool { return !strings.HasPrefix(r.Subject, subject) })
}
