// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// machineOf says to the destination what it has to match.
func machineOf(facts *qemu.Facts, qmpPath string) *migratedv1.SourceMachine {
	machine := &migratedv1.SourceMachine{
		Name: facts.Name, QemuVersion: facts.Version.String(), MachineType: facts.MachineType,
		CommandLine: facts.CommandLine, WorkingDirectory: facts.WorkingDirectory,
		Uid: facts.UID, Gid: facts.GID, Groups: facts.Groups, QmpPath: qmpPath,
	}
	for _, b := range facts.RAMBlocks {
		machine.RamBlocks = append(machine.RamBlocks, &migratedv1.RamBlock{
			Id: b.ID, Size: b.Size, PageSize: b.PageSize, File: b.FileIdentity,
		})
	}
	return machine
}

// matchMachine finds the destination's RAM blocks in the order of the
// source's, or says what keeps the two machines from being one.
func matchMachine(source *migratedv1.SourceMachine, destination *qemu.Facts) ([]qemu.RAMBlock, error) {
	if source.GetMachineType() != destination.MachineType {
		return nil, withRemedy(
			fmt.Errorf("the machine types differ: source %s, destination %s", source.GetMachineType(), destination.MachineType),
			"start the destination QEMU with -machine "+source.GetMachineType())
	}
	here := make(map[string]qemu.RAMBlock, len(destination.RAMBlocks))
	for _, b := range destination.RAMBlocks {
		here[b.ID] = b
	}
	var blocks []qemu.RAMBlock
	for _, want := range source.GetRamBlocks() {
		got, exists := here[want.GetId()]
		delete(here, want.GetId())
		switch {
		case !exists:
			return nil, withRemedy(fmt.Errorf("the destination has no memory backend %q", want.GetId()),
				"give the destination QEMU the source's -object memory-backend-file options, with the same ids")
		case got.Size != want.GetSize():
			return nil, withRemedy(
				fmt.Errorf("the RAM sizes differ: memory backend %q has %d bytes at the source and %d at the destination",
					want.GetId(), want.GetSize(), got.Size),
				"give both QEMUs the same memory size")
		case got.PageSize != want.GetPageSize():
			return nil, withRemedy(
				fmt.Errorf("the page sizes differ: memory backend %q has pages of %d bytes at the source and %d at the destination",
					want.GetId(), want.GetPageSize(), got.PageSize),
				"put the memory backend on the same kind of file system (tmpfs or hugetlbfs) on both hosts")
		case got.FileIdentity == want.GetFile():
			return nil, withRemedy(
				fmt.Errorf("memory backend %q of the destination is the very file that the source VM runs on", want.GetId()),
				"source and destination share a file system: give the destination another mem-path with --template")
		}
		blocks = append(blocks, got)
	}
	for id := range here {
		return nil, fmt.Errorf("the destination has a memory backend %q that the source has not", id)
	}
	return blocks, nil
}

// checkVM refuses a VM that cannot migrate, with every reason.
func checkVM(ctx context.Context, vm *qemu.VM) error {
	var reasons []error
	remedy := ""
	for _, result := range qemu.CheckVM(ctx, vm) {
		if result.Status != qemu.Failed {
			continue
		}
		reasons = append(reasons, fmt.Errorf("%s: %s", result.Subject, result.Detail))
		if remedy == "" {
			remedy = result.Remedy
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	return withRemedy(fmt.Errorf("this VM cannot migrate: %w", errors.Join(reasons...)), remedy)
}
