// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/pagesrv/pagemap"
	"github.com/migrated-vm/migrated/pkg/postcopy"
)

// openFiles gives the engine what it needs where another process touches the VM's memory. Without it such a page is
// only counted.
func (d *Destination) openFiles(facts *keptFactsV1, blocks []postcopy.Block) {
	var err error
	if d.pagemap, err = pagemap.Open(facts.QEMU.PID); err != nil {
		d.log.Warn("pages that another process touches cannot be told from the VM's", "error", err)
		return
	}
	for i := range blocks {
		b := &blocks[i]
		if b.File, b.FileOffset, err = qemu.OpenRAMFile(facts.QEMU, b.Addr); err != nil {
			d.log.Warn("pages that another process touches cannot be written again", "ram", b.ID, "error", err)
		}
		if b.File != nil {
			d.files = append(d.files, b.File)
		}
	}
}

// closeFiles is for when the engine's last Run has returned.
func (d *Destination) closeFiles() {
	if d.pagemap != nil {
		_ = d.pagemap.Close()
	}
	for _, f := range d.files {
		_ = f.Close() // nothing of it is buffered
	}
	d.pagemap, d.files = nil, nil
}

// warnOfOthers says once that another process has touched the VM's memory, and once that the VM may have zeros for it.
func (d *Destination) warnOfOthers(stats postcopy.Stats) {
	if n := stats.PagesTouched; n > 0 {
		d.warnTouched.Do(func() {
			d.log.Warn("another process touches the VM's memory before it has come: the VM has what it should, "+
				"that process may have read zeros", "pages", n)
		})
	}
	if n := stats.PagesUnexplained; n > 0 {
		d.warnUnexplained.Do(func() {
			d.log.Error("pages were there before they had come, and cannot be written again: the VM's memory may be corrupt",
				"pages", n)
		})
	}
}
