// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// wholeCopy is the record of a worker that installs a gigantic page, and belongs to whoever holds wholeMu. bulkCopies
// are those of the bulk lanes.
func (e *Engine) wholeCopy() *uffd.CopyRecord   { return &e.copies[e.workers] }
func (e *Engine) bulkCopies() []uffd.CopyRecord { return e.copies[e.workers+1:] }

// takeUpCopies marks the pages that an earlier engine's last copies put in, by what the kernel has answered to them.
//
// A process that is killed in UFFDIO_COPY ends only when the copy has ended. So pages may be there, and in use by the
// guest, while the table says that they are being installed. To ask for such a page again does no harm as long as it is
// there: the kernel answers EEXIST. But the guest may have cleared and freed it meanwhile, and QEMU may have punched it
// out of the file, for which there is no event (discard.go). Then what the page held at the switch would
// come back, although the guest knows it to be zero (init_on_free=1). Only the kernel's answer tells such a page from
// one that never came.
func (e *Engine) takeUpCopies(memory []byte) error {
	if memory == nil {
		e.copies = make([]uffd.CopyRecord, e.workers+1+mostBulkLanes)
		return nil
	}
	if e.copies = uffd.CopyRecords(memory); len(e.copies) < e.workers+2 {
		return fmt.Errorf("post-copy: %w: %d bytes for the copies of %d workers, or not aligned",
			ErrState, len(memory), e.workers)
	}
	for i := range e.copies {
		dst, n, exists := e.copies[i].Answer()
		b := e.blockAt(dst)
		if b == nil {
			continue // no answer, or another VM's
		}
		if exists && b.minor {
			continue // another process made it, and its content was to be written, see others.go
		}
		n = min(n, b.Addr+b.Size-dst) >> b.shift
		if exists {
			n = b.PageSize >> b.shift
		}
		e.pages.landed(b.first+(dst-b.Addr)>>b.shift, n)
	}
	return nil
}

// blockAt returns the block that holds addr, or nil.
func (e *Engine) blockAt(addr uint64) *block {
	for i := range e.blocks {
		if b := &e.blocks[i]; addr-b.Addr < b.Size {
			return b
		}
	}
	return nil
}
