// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/digitalocean/go-qemu/qmp/raw"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qom"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Describe asks a VM's QEMU for everything that Compare looks at. It takes a few commands, and a few more for each
// device.
func Describe(ctx context.Context, vm *qemu.VM) (*migratedv1.MachineDescription, error) {
	d := &migratedv1.MachineDescription{QemuVersion: vm.QMP.Version().String()}
	anonymous := map[string]string{} // names for devices without an id, by their paths
	err := describeDevices(ctx, vm, d, anonymous)
	if err == nil {
		err = describeCPUs(ctx, vm, d)
	}
	if err == nil {
		err = describeDrives(ctx, vm, d, anonymous)
	}
	var kvm raw.KVMInfo
	if err == nil {
		kvm, err = vm.QMP.Typed(ctx).QueryKVM()
	}
	var uuid raw.UUIDInfo
	if err == nil {
		uuid, err = vm.QMP.Typed(ctx).QueryUUID()
	}
	if err == nil {
		d.GenerationId, err = generationID(ctx, vm)
	}
	if err != nil {
		return nil, fmt.Errorf("describe the VM: %w", err)
	}
	d.Kvm, d.Uuid = kvm.Enabled, uuid.UUID
	return d, nil
}

// generationID returns the id of the device vmgenid, or "" if the VM has none.
func generationID(ctx context.Context, vm *qemu.VM) (string, error) {
	var info struct {
		GUID string `json:"guid"`
	}
	err := vm.QMP.Do(ctx, "query-vm-generation-id", nil, &info)
	if errors.Is(err, qmp.ErrGeneric) || errors.Is(err, qmp.ErrCommandNotFound) {
		return "", nil
	}
	return info.GUID, err
}

// children returns the children of an object in QEMU's object tree, sorted by name.
func children(ctx context.Context, vm *qemu.VM, path string) ([]qom.Child, error) {
	list, err := qom.Children(ctx, vm.QMP, path)
	slices.SortFunc(list, func(a, b qom.Child) int { return strings.Compare(a.Name, b.Name) })
	return list, err
}

// builtIn is the path in QEMU's object tree below which the machine's built-in devices are.
const builtIn = "/machine/unattached"

// describeDevices fills in d.Devices and d.BuiltIn, and adds to anonymous.
func describeDevices(
	ctx context.Context, vm *qemu.VM, d *migratedv1.MachineDescription, anonymous map[string]string,
) error {
	for _, parent := range []string{qom.NamedDevices, qom.UnnamedDevices} {
		list, err := children(ctx, vm, parent)
		if err != nil {
			return err
		}
		for _, c := range list {
			path := parent + "/" + c.Name
			device := &migratedv1.Device{Class: c.Class()}
			if device.Place, err = placeOf(ctx, vm, path, c.Class()); err != nil {
				return err
			}
			if parent == qom.NamedDevices {
				device.Id = c.Name
			} else {
				anonymous[path] = strings.TrimSpace(device.GetClass() + " " + device.GetPlace())
			}
			d.Devices = append(d.Devices, device)
		}
	}
	list, err := children(ctx, vm, builtIn)
	for _, c := range list {
		if strings.HasPrefix(c.Name, "device[") {
			d.BuiltIn = append(d.BuiltIn, c.Class())
		}
	}
	slices.Sort(d.BuiltIn)
	return err
}

// placeOf returns the bus of a device and its address on it: "pcie.0 02.0".
func placeOf(ctx context.Context, vm *qemu.VM, path, class string) (string, error) {
	var bus string
	if found, err := property(ctx, vm, path, "parent_bus", &bus); err != nil || !found || bus == "" {
		return "", err
	}
	bus = bus[strings.LastIndexByte(bus, '/')+1:] // its path in the tree differs between versions
	switch {
	case strings.HasPrefix(class, "scsi-"):
		var address [3]int
		for i, name := range []string{"channel", "scsi-id", "lun"} {
			if _, err := property(ctx, vm, path, name, &address[i]); err != nil {
				return "", err
			}
		}
		return fmt.Sprintf("%s %d:%d:%d", bus, address[0], address[1], address[2]), nil
	case strings.HasPrefix(class, "usb-"):
		var port string
		_, err := property(ctx, vm, path, "port", &port)
		return strings.TrimSpace(bus + " " + port), err
	}
	var slot int
	found, err := property(ctx, vm, path, "addr", &slot)
	if err != nil || !found || slot < 0 {
		return bus, err
	}
	return fmt.Sprintf("%s %02x.%x", bus, slot>>3, slot&7), nil // PCI_SLOT and PCI_FUNC of QEMU's devfn
}

// property reads a property of an object into value. found is false if the object has no such property, or if its value
// has another type.
func property(ctx context.Context, vm *qemu.VM, path, name string, value any) (found bool, err error) {
	var raw json.RawMessage
	err = vm.QMP.Do(ctx, "qom-get", map[string]string{"path": path, "property": name}, &raw)
	if errors.Is(err, qmp.ErrGeneric) {
		return false, nil
	}
	return err == nil && json.Unmarshal(raw, value) == nil, err
}

// describeCPUs fills in d.Cpus and d.Features.
func describeCPUs(ctx context.Context, vm *qemu.VM, d *migratedv1.MachineDescription) error {
	var cpus []struct {
		Path  string         `json:"qom-path"`
		Props map[string]int `json:"props"`
	}
	if err := vm.QMP.Do(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return err
	}
	slots, err := vm.QMP.Typed(ctx).QueryHotpluggableCpus()
	if err != nil && !errors.Is(err, qmp.ErrGeneric) { // a machine without slots for CPUs refuses the command
		return err
	}
	classes := map[string]string{} // of CPUs, by their paths
	for _, s := range slots {
		if s.QomPath != nil { // else the slot is empty
			classes[*s.QomPath] = s.Type
		}
	}
	for _, c := range cpus {
		var place []string
		for _, name := range slices.Backward(slices.Sorted(maps.Keys(c.Props))) {
			place = append(place, fmt.Sprintf("%s %d", name, c.Props[name]))
		}
		d.Cpus = append(d.Cpus, &migratedv1.Cpu{Class: classes[c.Path], Place: strings.Join(place, ", ")})
	}
	slices.SortFunc(d.Cpus, func(a, b *migratedv1.Cpu) int { return strings.Compare(a.GetPlace(), b.GetPlace()) })
	if len(cpus) == 0 {
		return nil
	}
	var words []struct {
		Leaf     uint32 `json:"cpuid-input-eax"`
		Subleaf  uint32 `json:"cpuid-input-ecx"`
		Register string `json:"cpuid-register"`
		Bits     uint32 `json:"features"`
	}
	_, err = property(ctx, vm, cpus[0].Path, "feature-words", &words)
	for _, w := range words {
		if w.Bits != 0 {
			d.Features = append(d.Features,
				&migratedv1.CpuidWord{Leaf: w.Leaf, Subleaf: w.Subleaf, Register: w.Register, Bits: w.Bits})
		}
	}
	return err
}
