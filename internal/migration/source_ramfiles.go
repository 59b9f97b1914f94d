// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// ramFilesOf returns the files of the VM's memory that remain when vm, its QEMU, has ended. Nobody needs them once all
// memory is at the destination. A file that QEMU does not report stays, and so do all of a QEMU that is kept.
func (s *Source) ramFilesOf(vm *qemu.VM) []ram.File {
	if s.cfg.Spec.GetKeepSource() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	blocks, err := vm.RAM.Blocks(ctx)
	var files []ram.File
	if err == nil {
		files, err = vm.RAM.Files(ctx, blocks)
	}
	if err != nil {
		s.log.Warn("files of the VM's memory may stay on this host: QEMU does not say which it has", "error", err)
	}
	return files
}

// removeRAMFiles removes files after QEMU has ended, and shows the result for each.
func (s *Source) removeRAMFiles(files []ram.File) {
	if s.ram != nil && len(files) > 0 { // it has the files open
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

// keepMemory has QEMU leave its memory in its files also if it ends before all of it is at the destination. What is in
// a file is served then, see watchQEMU.
func (s *Source) keepMemory(ctx context.Context) error {
	if s.cfg.Spec.GetRehearse() {
		return nil
	}
	changed, err := s.vm.RAM.KeepWhenQEMUEnds(ctx)
	s.discards = append(s.discards, changed...)
	if err != nil {
		return withRemedy(fmt.Errorf("have QEMU keep the VM's memory when it ends: %w", err),
			"start the VM without discard-data=on (libvirt's <discard/>)")
	}
	return nil
}

// undoKeepMemory undoes keepMemory for a VM that goes on here.
func (s *Source) undoKeepMemory() {
	if len(s.discards) == 0 || s.vm == nil || s.qemuEnded() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	if err := s.monitor().RAM.DiscardWhenQEMUEnds(ctx, s.discards); err != nil {
		s.log.Warn("QEMU will leave the VM's memory in its files when it ends", "error", err)
	}
}
