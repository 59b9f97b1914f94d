// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// loadedTwice are the devices whose state is loaded while the VM runs, and again if it has changed when the VM has
// stopped. Loading them takes QEMU long, because it maps them into the guest, and QEMU 7.2, 10.0 and 11.1 can load them
// a second time: QEMU loads sections in any order and number, and COLO loads all of them again and again.
// TestLoadedTwice (e2e/twice) checks this list with the three versions. All other devices are loaded once, when the VM
// has stopped. Some of them must not be loaded twice: QEMU would keep the earlier resources of virtio-gpu and slots of
// xhci, and a second handler for pflash_cfi01.
var loadedTwice = []string{
	"PCIHost", "PCIBUS", "fw_cfg", "kvm-tpr-opt", "acpi_build",
	"mch", lpcBridge, "ich9_ahci", "ich9_smb", // q35
	"I440FX", "PIIX3", "piix4_pm", // pc
	"pcie-root-port", "pcie-pci-bridge",
	"virtio-net", "virtio-blk", "virtio-scsi", "virtio-console", "virtio-balloon", "virtio-rng", "virtio-input",
	"e1000e", "e1000", "rtl8139", "vmxnet3", "lsiscsi", "megasas", "pvscsi",
	"vga", "cirrus_vga", "ehci", "uhci", "intel-hda", "i6300esb_wdt",
}

const (
	// lpcBridge is the LPC bridge of q35 machines. Loading it maps its root complex registers. If they are mapped
	// already, QEMU aborts (ich9_lpc_post_load in hw/isa/lpc_ich9.c): see Remaps.
	lpcBridge = "ICH9LPC"
	// pciHost is the PCI host. Its state has the address for the next access to PCI configuration space.
	pciHost = "PCIHost"
)

// Twice returns the kinds of devices whose sections Early returns.
func Twice() []string { return slices.Clone(loadedTwice) }

// Device returns the kind of the device: "virtio-net" of "0000:00:16.0:00.0/virtio-net", without the slot.
func (s Section) Device() string { return s.Name[strings.LastIndexByte(s.Name, '/')+1:] }

// Early returns the sections of a whole state that are loaded while the VM still runs at the source. It returns
// ErrAmbiguous where a guest may have made one of them.
func Early(all []Section) ([]Section, error) {
	if err := checkOneSplit(all); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(all), func(s Section) bool {
		return !slices.Contains(loadedTwice, s.Device())
	}), nil
}

// ErrOtherForm says that the state of a device has another length, or other subsections, than when it was loaded early.
// Loading it again would leave parts of the earlier state in QEMU.
var ErrOtherForm = errors.New("the state of a device has another form than when it was loaded early")

// checkForm returns ErrOtherForm unless is can be loaded over was.
func checkForm(was, is Section) error {
	if len(was.Bytes) == len(is.Bytes) && slices.Equal(subsections(was.Bytes), subsections(is.Bytes)) {
		return nil
	}
	return fmt.Errorf("%w: %q had %d bytes and has %d", ErrOtherForm, is.Name, len(was.Bytes), len(is.Bytes))
}

// subsections returns the names of all that look like subsections: 05, the length of the name, and a name with a slash
// in it (vmstate_subsection_save in migration/vmstate.c).
func subsections(state []byte) (names []string) {
	const begin, shortest = 0x05, 4
	for i := 0; i+2 < len(state); i++ {
		n := int(state[i+1])
		if state[i] != begin || n < shortest || i+2+n > len(state) {
			continue
		}
		name := state[i+2 : i+2+n]
		if bytes.IndexByte(name, '/') > 0 && !bytes.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' }) {
			names = append(names, string(name))
		}
	}
	return names
}

// Remaps says whether loading changes maps registers that are mapped already. They have to be unmapped before, by a
// write to PCI configuration space through the PCI host, whose sections Hosts returns.
func Remaps(changes []Change) bool {
	return slices.ContainsFunc(changes, func(c Change) bool { return c.Of >= 0 && c.Device() == lpcBridge })
}

// Hosts returns the sections of PCI hosts.
func Hosts(sections []Section) []Section {
	return slices.DeleteFunc(slices.Clone(sections), func(s Section) bool { return s.Device() != pciHost })
}

// Commands of a migration stream (enum qemu_vm_cmd in migration/savevm.c), and QEMU's answers (enum mig_rp_message_type
// in migration/migration.h). Both have a type and a length, 16 bits each, and that many bytes.
const (
	sectionCommand = 0x08

	commandReturnPath = 1
	commandPing       = 2
	answerPong        = 2
)

// ReturnPath is the command that makes QEMU answer on the socket that it reads from.
var ReturnPath = []byte{sectionCommand, 0, commandReturnPath, 0, 0}

// Ping returns the command that makes QEMU answer with Pong(n) when it has loaded everything before it.
func Ping(n uint32) []byte {
	return append([]byte{sectionCommand, 0, commandPing, 0, 4}, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

// Pong returns QEMU's answer to Ping(n).
func Pong(n uint32) []byte {
	return []byte{0, answerPong, 0, 4, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
}
