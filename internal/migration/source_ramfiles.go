// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// ramFiles asks what the VM's QEMU will leave of its memory. Nobody needs it once all of it is at the destination, but
// a file that is not known stays.
func (s *Source) ramFiles() []qemu.RAMFile {
	if s.cfg.Spec.GetKeepSource() || s.facts == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	files, err := s.vm.RAMFiles(ctx, s.facts.RAMBlocks)
	if err != nil {
		s.log.Warn("files of the VM's memory may stay on this host: QEMU does not say which it has", "error", err)
	}
	return files
}

// freeRAM removes the files of a QEMU that has ended, and shows what became of them.
func (s *Source) freeRAM(files []qemu.RAMFile) {
	if s.ram != nil && len(files) > 0 { // who serves the pages has them open
		if err := s.ram.Close(); err != nil {
			s.log.Warn("close the VM's memory", "error", err)
		}
		s.ram = nil
	}
	var shown []string
	for _, f := range files {
		line := f.Path + ": removed"
		if err := f.Remove(); err != nil {
			line = fmt.Sprintf("%s: %v", f.Path, err)
			s.log.Warn("a file of the VM's memory stays on this host", "file", f.Path, "reason", err)
		} else {
			s.log.Info("removed a file of the VM's memory", "file", f.Path)
		}
		shown = append(shown, line)
	}
	s.update(func(m *migratedv1.Migration) { m.RamFiles = shown })
}
