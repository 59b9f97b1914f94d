// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qom"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// Facts are the properties of a VM that the destination has to match or repeat.
type Facts struct {
	Name        string // from -name; may be empty
	Version     qmp.Version
	MachineType string // versioned: "pc-q35-7.2"
	KVM         bool   // false: TCG or another accelerator

	// Definition is libvirt's definition of the VM. It is empty when libvirt does not manage the VM.
	Definition string

	process.Facts

	RAMBlocks []ram.Block
}

// Facts asks QEMU and reads /proc. It returns the *ram.Errors of RAM.Blocks when the RAM cannot be moved.
func (vm *VM) Facts(ctx context.Context) (*Facts, error) {
	f := &Facts{Version: vm.QMP.Version()}
	var name struct {
		Name string `json:"name"`
	}
	if err := vm.QMP.Do(ctx, "query-name", nil, &name); err != nil {
		return nil, err
	}
	kvm, err := vm.QMP.Typed(ctx).QueryKVM()
	if err != nil {
		return nil, err
	}
	// The class of the machine object has the versioned name: an alias such as "q35" is resolved in it.
	var class string
	if err := qom.Property(ctx, vm.QMP, "/machine", "type", &class); err != nil {
		return nil, err
	}
	f.Name, f.KVM, f.MachineType = name.Name, kvm.Enabled, strings.TrimSuffix(class, "-machine")
	if f.Facts, err = process.ReadFacts(vm.Pid); err != nil {
		return nil, err
	}
	if vm.domain != nil {
		if f.Definition, err = vm.domain.Definition(ctx); err != nil {
			return nil, err
		}
	}
	f.RAMBlocks, err = vm.RAM.Blocks(ctx)
	return f, err
}
