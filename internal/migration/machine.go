// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// machine returns what the destination has to match, with the definition of the VM for the destination, if one was
// given.
func (s *Source) machine() (*migratedv1.SourceMachine, error) {
	m, err := machineOf(s.facts, s.description, s.cfg.Spec.GetVm())
	if err != nil || s.cfg.DestinationXML == "" {
		return m, err
	}
	if err := libvirt.SameDomain(m.LibvirtDefinition, s.cfg.DestinationXML); err != nil {
		return nil, withReason(withRemedy(fmt.Errorf("the definition that was given for the destination: %w", err),
			"edit the output of 'virsh dumpxml --migratable --security-info'"),
			migratedv1.Reason_REASON_VM_REFUSED)
	}
	m.LibvirtDefinition = s.cfg.DestinationXML
	return m, nil
}

// machineOf describes the VM to the destination, which has to match it.
func machineOf(
	facts *qemu.Facts, description *migratedv1.MachineDescription, qmpPath string,
) (*migratedv1.SourceMachine, error) {
	machine := &migratedv1.SourceMachine{
		Description: description,
		Name:        facts.Name, QemuVersion: facts.Version.String(), MachineType: facts.MachineType,
		CommandLine: facts.CommandLine, WorkingDirectory: facts.WorkingDirectory,
		Uid: facts.UID, Gid: facts.GID, Groups: facts.Groups, QmpPath: qmpPath,
		Attributes: attributesTo(facts.Attributes), PrivateMemory: facts.PrivateMemory, HugeMemory: facts.HugeMemory,
		LibvirtDefinition: facts.Definition,
	}
	for _, text := range slices.Concat([]string{machine.Name, machine.WorkingDirectory, qmpPath}, machine.CommandLine) {
		if !utf8.ValidString(text) {
			return nil, withRemedy(withReason(
				fmt.Errorf("%q, in the VM's command line, is not UTF-8, and cannot be sent to the destination", text),
				migratedv1.Reason_REASON_VM_REFUSED), "start the VM with names and paths in UTF-8")
		}
	}
	for _, b := range facts.RAMBlocks {
		block := &migratedv1.RamBlock{
			Id: b.ID, Size: b.Size, PageSize: b.PageSize, File: b.FileIdentity, Populated: b.Populated,
			Present: b.Present,
		}
		if !b.ReadOnly {
			machine.RamBlocks = append(machine.RamBlocks, block)
			continue
		}
		var err error
		if block.Digest, err = digest(b); err != nil {
			return nil, err
		}
		machine.ReadOnlyBlocks = append(machine.ReadOnlyBlocks, block)
	}
	return machine, nil
}

// digest returns the SHA-256 sum of a read-only block's content.
func digest(b ram.Block) ([]byte, error) {
	f, err := os.Open(b.Path)
	if err != nil {
		return nil, fmt.Errorf("RAM %q, which is read-only: %w", b.ID, err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, b.FileOffset, int64(b.Size))); err != nil {
		return nil, fmt.Errorf("RAM %q, which is read-only: %w", b.ID, err)
	}
	return sum.Sum(nil), nil
}

// matchMachine returns the destination's RAM blocks in the order of the source's, or an error that says how the two
// machines differ.
func matchMachine(source *migratedv1.SourceMachine, destination *qemu.Facts) ([]ram.Block, error) {
	if source.GetMachineType() != destination.MachineType {
		return nil, withRemedy(
			fmt.Errorf("the machine types differ: source %s, destination %s", source.GetMachineType(), destination.MachineType),
			"start the destination QEMU with -machine "+source.GetMachineType())
	}
	here := make(map[string]ram.Block, len(destination.RAMBlocks))
	for _, b := range destination.RAMBlocks {
		here[b.ID] = b
	}
	var blocks []ram.Block
	for _, want := range source.GetRamBlocks() {
		got, err := matchBlock(want, here, false)
		if err != nil {
			return nil, err
		}
		blocks = append(blocks, got)
	}
	for _, want := range source.GetReadOnlyBlocks() {
		got, err := matchBlock(want, here, true)
		if err != nil {
			return nil, err
		}
		sum, err := digest(got)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(sum, want.GetDigest()) {
			return nil, withRemedy(
				fmt.Errorf("RAM %q is read-only, and its file %s holds something else than the source's", got.ID, got.File),
				"put the same image there on both hosts")
		}
	}
	for id := range here {
		return nil, withRemedy(fmt.Errorf("the destination has RAM %q that the source has not", id),
			"give both QEMUs the same devices and memory, under the same ids")
	}
	return blocks, nil
}

// matchBlock removes the block that want names from here, the destination's blocks, and returns it if it matches want.
func matchBlock(want *migratedv1.RamBlock, here map[string]ram.Block, readOnly bool) (ram.Block, error) {
	got, exists := here[want.GetId()]
	delete(here, want.GetId())
	switch {
	case !exists:
		return got, withRemedy(fmt.Errorf("the destination has no RAM %q of %d bytes", want.GetId(), want.GetSize()),
			"give the destination QEMU the source's memory and devices, under the same ids: what was plugged in while "+
				"the VM ran is not on the source's command line, but can be added with --template, "+
				"or by starting the destination QEMU yourself (--to-qmp)")
	case got.Size != want.GetSize():
		return got, withRemedy(
			fmt.Errorf("the RAM sizes differ: %q has %d bytes at the source and %d at the destination",
				want.GetId(), want.GetSize(), got.Size),
			"give both QEMUs the same memory size, and the same firmware")
	case got.PageSize != want.GetPageSize():
		return got, withRemedy(
			fmt.Errorf("the page sizes differ: RAM %q has pages of %d bytes at the source and %d at the destination",
				want.GetId(), want.GetPageSize(), got.PageSize),
			"give the memory backend the same kind of memory on both hosts (huge pages or none)")
	case got.ReadOnly != readOnly:
		return got, withRemedy(fmt.Errorf("RAM %q is read-only on one host alone", want.GetId()),
			"give the memory backend the same readonly= on both hosts")
	case got.FileIdentity != "" && got.FileIdentity == want.GetFile() && !readOnly:
		return got, withRemedy(
			fmt.Errorf("RAM %q of the destination is the very file that the source VM runs on", want.GetId()),
			"source and destination share a file system: give the destination another mem-path with --template")
	}
	return got, nil
}

// checkVM refuses a VM that cannot be migrated. The error has every reason.
func checkVM(ctx context.Context, vm *qemu.VM) error {
	return refusalOf("this VM cannot migrate", check.VM(ctx, vm))
}

// checkRAMNotShared refuses a VM whose RAM another process maps by now. It is called right before the VM is stopped.
// host is "source" or "destination".
func checkRAMNotShared(vm *qemu.VM, blocks []ram.Block, host string) error {
	err := vm.RAM.CheckAlone(blocks)
	var bad *ram.Error
	switch {
	case errors.As(err, &bad):
		return withRemedy(fmt.Errorf("RAM %q of the %s: %s", bad.ID, host, bad.Reason), bad.Remedy)
	case err != nil:
		return fmt.Errorf("look who maps the RAM of the %s QEMU: %w", host, err)
	}
	return nil
}
