// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// maxLostRanges is the largest number of ranges of lost pages that the log names.
const maxLostRanges = 16

// openFiles gives the engine what it needs when another process touches the VM's memory. Without it, the engine only
// counts such pages.
func (d *Destination) openFiles(facts *keptFactsV1, blocks []postcopy.Block) {
	var err error
	if d.pagemap, err = uffd.OpenPagemap(facts.QEMU.PID); err != nil {
		d.log.Warn("cannot tell pages that another process touches from the VM's", "error", err)
		return
	}
	for i := range blocks {
		b := &blocks[i]
		if b.File, b.FileOffset, err = ram.OpenFile(facts.QEMU, b.Addr); err != nil {
			d.log.Warn("pages that another process touches cannot be written again", "ram", b.ID, "error", err)
		}
		if b.File != nil {
			d.files = append(d.files, b.File)
		}
	}
}

// closeFiles closes what openFiles opened. It is called when the engine's last Run has returned.
func (d *Destination) closeFiles() {
	if d.pagemap != nil {
		_ = d.pagemap.Close()
	}
	for _, f := range d.files {
		_ = f.Close() // nothing is buffered
	}
	d.pagemap, d.files = nil, nil
}

// warnOfOtherProcesses logs each of these once: another process has touched the VM's memory; memory of the VM may be
// corrupt; the source cannot read some of the VM's memory.
func (d *Destination) warnOfOtherProcesses(stats postcopy.Stats) {
	if n := stats.PagesTouched; n > 0 {
		d.warnTouched.Do(func() {
			d.log.Warn("another process touched memory of the VM before it arrived: the VM's content is right, "+
				"but that process may have read zeros", "pages", n)
		})
	}
	if n := stats.PagesUnexplained; n > 0 {
		d.warnUnexplained.Do(func() {
			d.log.Error("pages existed before their content came, and cannot be overwritten: the VM's memory may be corrupt",
				"pages", n)
		})
	}
	if n := stats.PagesLost; n > 0 {
		d.warnLost.Do(func() {
			var where []string
			for _, s := range d.engine.Lost(maxLostRanges) {
				where = append(where, fmt.Sprintf("%s %#x+%#x", d.blocks[s.Block].ID, s.Offset, s.Bytes))
			}
			d.log.Error("the source cannot read all of the VM's memory: "+
				"the VM gets a machine check when it touches these pages",
				"pages", n, "first", strings.Join(where, ", "))
		})
	}
}
