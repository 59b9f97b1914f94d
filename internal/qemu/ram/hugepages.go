// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/migrated-vm/migrated/internal/qemu/hugepages"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// collapseFillsMissing asks this host's kernel. Tests replace it.
var collapseFillsMissing = uffd.CollapseFillsMissing

// checkHolesKept refuses blocks in which khugepaged might put zeros where pages have not arrived yet. Linux before 6.4
// does so where shared memory may have transparent huge pages (uffd.CollapseFillsMissing). The error contains an *Error
// per block, joined.
//
// MADV_NOHUGEPAGE in QEMU would not be enough. khugepaged reaches the file through any mapping of it, so a process that
// maps the file later would bring the danger back. khugepaged may also be in the middle of such a range already; the
// advice does not stop it.
func (mem *Memory) checkHolesKept(blocks []Block) error {
	blocks = slices.DeleteFunc(slices.Clone(blocks), func(b Block) bool {
		return b.Private || b.ReadOnly || b.PageSize != uint64(os.Getpagesize())
	})
	if len(blocks) == 0 {
		return nil
	}
	settings, err := hugepages.SettingsOf(mem.process.PID())
	if err != nil {
		return err
	}
	var failed []error
	for _, b := range blocks {
		where, err := settings.At(b.Addr)
		if err != nil {
			return fmt.Errorf("RAM %q: %w", b.ID, err)
		}
		if where.Permitted() {
			failed = append(failed, filledWithZeros(b.ID, where))
		}
	}
	if len(failed) == 0 {
		return nil
	}
	switch fills, err := collapseFillsMissing(); {
	case err != nil:
		return fmt.Errorf("find out whether transparent huge pages may hide missing pages: %w", err)
	case !fills:
		return nil
	}
	return errors.Join(failed...)
}

// filledWithZeros returns the error for a block at such a place.
func filledWithZeros(id string, where hugepages.Place) *Error {
	return &Error{id, where.Because() + ", and this kernel may fill missing pages with zeros " +
		"when it makes a transparent huge page: the VM would read these zeros", where.Remedy()}
}
