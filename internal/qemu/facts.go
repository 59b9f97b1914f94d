// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// Facts are what a destination has to match or repeat.
type Facts struct {
	Name        string // of -name; may be empty
	Version     qmp.Version
	MachineType string // versioned: "pc-q35-7.2"
	KVM         bool   // else TCG or another accelerator
	Discards    bool   // has a device that gives memory back while the VM runs

	// Definition is the VM's as libvirt has it; empty: it is none of libvirt's.
	Definition string

	CommandLine      []string // argv[0] first
	WorkingDirectory string
	UID, GID         uint32 // effective
	Groups           []uint32
	Attributes       Attributes
	// PrivateMemory is what QEMU alone holds in small pages, in memory or swapped out; HugeMemory what it holds in huge
	// pages, those of files included. Bytes, at this moment.
	PrivateMemory, HugeMemory uint64

	RAMBlocks []RAMBlock
}

// Facts asks QEMU and /proc. It fails with the *RAMErrors of RAMBlocks where RAM cannot be moved.
func (vm *VM) Facts(ctx context.Context) (*Facts, error) {
	f := &Facts{Version: vm.QMP.Version()}
	var name struct {
		Name string `json:"name"`
	}
	var kvm struct {
		Enabled bool `json:"enabled"`
	}
	if err := vm.QMP.Do(ctx, "query-name", nil, &name); err != nil {
		return nil, err
	}
	if err := vm.QMP.Do(ctx, "query-kvm", nil, &kvm); err != nil {
		return nil, err
	}
	// The class of the machine object: an alias such as "q35" is resolved in it.
	var class string
	if err := vm.property(ctx, "/machine", "type", &class); err != nil {
		return nil, err
	}
	f.Name, f.KVM, f.MachineType = name.Name, kvm.Enabled, strings.TrimSuffix(class, "-machine")
	if err := vm.processFacts(f); err != nil {
		return nil, err
	}
	var err error
	if vm.domain != nil {
		if f.Definition, err = vm.domain.Definition(ctx); err != nil {
			return nil, err
		}
	}
	if f.Discards, err = vm.discards(ctx); err != nil {
		return nil, err
	}
	f.RAMBlocks, err = vm.RAMBlocks(ctx)
	return f, err
}

// discards says whether the VM has a device that gives memory back while it runs.
func (vm *VM) discards(ctx context.Context) (bool, error) {
	devices, err := vm.memoryDevices(ctx)
	if err != nil || slices.ContainsFunc(devices, func(d memoryDevice) bool { return d.Type == virtioMem }) {
		return err == nil, err
	}
	return vm.hasBalloon(ctx)
}

// hasBalloon asks the balloon for its size: DeviceNotActive says that there is none. QEMU answers also while the
// guest has no driver for it. Any other refusal is taken for a balloon, which costs little.
func (vm *VM) hasBalloon(ctx context.Context) (bool, error) {
	var refused *qmp.Error
	err := vm.QMP.Do(ctx, "query-balloon", nil, nil)
	if errors.As(err, &refused) {
		return refused.Class != "DeviceNotActive", nil
	}
	return err == nil, err
}

func (vm *VM) processFacts(f *Facts) error {
	var err error
	if f.CommandLine, err = readArgs(vm.Pid); err != nil {
		return err
	}
	if f.WorkingDirectory, err = os.Readlink(fmt.Sprintf("/proc/%d/cwd", vm.Pid)); err != nil {
		return fmt.Errorf("working directory of QEMU: %w", err)
	}
	status, err := readStatus(vm.Pid)
	if err != nil {
		return fmt.Errorf("user of QEMU: %w", err)
	}
	// Real, effective, saved and file system id; QEMU's -runas sets all of them.
	uids, uidErr := parseIDs(status["Uid"])
	gids, gidErr := parseIDs(status["Gid"])
	groups, groupErr := parseIDs(status["Groups"])
	if uidErr != nil || gidErr != nil || groupErr != nil || len(uids) < 2 || len(gids) < 2 {
		return fmt.Errorf("user of QEMU: /proc/%d/status says Uid %q, Gid %q, Groups %q",
			vm.Pid, status["Uid"], status["Gid"], status["Groups"])
	}
	f.UID, f.GID, f.Groups = uids[1], gids[1], groups
	if f.Attributes, err = vm.attributes(status); err != nil {
		return err
	}
	anonymous, anonymousErr := parseKiB(status["RssAnon"])
	swapped, swappedErr := parseKiB(status["VmSwap"])
	huge, hugeErr := parseKiB(status["HugetlbPages"])
	f.PrivateMemory, f.HugeMemory = anonymous+swapped, huge
	if err := errors.Join(anonymousErr, swappedErr, hugeErr); err != nil {
		return fmt.Errorf("memory of QEMU: /proc/%d/status: %w", vm.Pid, err)
	}
	return nil
}
