// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// twice are the devices whose state is loaded while the VM runs, and again if it has changed when the VM has stopped:
// those whose loading takes QEMU long, as it maps them into the guest, and which QEMU 7.2, 10.0 and 11.1 load a second
// time. QEMU loads sections as they come, and few devices mind, as COLO loads all of them again and again.
// TestLoadedTwice (e2e/twice) holds this list against each of the three. All others are loaded once, when the VM has
// stopped. Of these some must not be loaded twice: QEMU keeps the resources of virtio-gpu and the slots of xhci that it
// had, and of pflash_cfi01 a second handler.
var twice = []string{
	"PCIHost", "PCIBUS", "fw_cfg", "kvm-tpr-opt", "acpi_build",
	"mch", lpcBridge, "ich9_ahci", "ich9_smb", // q35
	"I440FX", "PIIX3", "piix4_pm", // pc
	"pcie-root-port", "pcie-pci-bridge",
	"virtio-net", "virtio-blk", "virtio-scsi", "virtio-console", "virtio-balloon", "virtio-rng", "virtio-input",
	"e1000e", "e1000", "rtl8139", "vmxnet3", "lsiscsi", "megasas", "pvscsi",
	"vga", "cirrus_vga", "ehci", "uhci", "intel-hda", "i6300esb_wdt",
}

const (
	// lpcBridge is that of a q35. Loading it maps its root complex registers, and ends QEMU if they are mapped already
	// (ich9_lpc_post_load in hw/isa/lpc_ich9.c): see Remaps.
	lpcBridge = "ICH9LPC"
	// pciHost has the address to which the next access of PCI configuration space goes.
	pciHost = "PCIHost"
)

// Twice are the devices that Early takes.
func Twice() []string { return slices.Clone(twice) }

// Device is the name of the kind of device, without the place where one is plugged in: "virtio-net" of
// "0000:00:16.0:00.0/virtio-net".
func (s Section) Device() string { return s.Name[strings.LastIndexByte(s.Name, '/')+1:] }

// Early are the sections that are loaded while the VM still runs elsewhere.
func Early(all []Section) []Section {
	return slices.DeleteFunc(slices.Clone(all), func(s Section) bool { return !slices.Contains(twice, s.Device()) })
}

// ErrOtherForm says that a device whose state was loaded early has another number of things in it now, or other parts
// (QEMU's subsections). QEMU would keep what is in the one and not in the other.
var ErrOtherForm = errors.New("the state of a device has another form than when it was loaded early")

// checkForm says whether is may be loaded over was.
func checkForm(was, is Section) error {
	if len(was.Bytes) == len(is.Bytes) && slices.Equal(parts(was.Bytes), parts(is.Bytes)) {
		return nil
	}
	return fmt.Errorf("%w: %q had %d bytes and has %d", ErrOtherForm, is.Name, len(was.Bytes), len(is.Bytes))
}

// parts are the names of what may be subsections: each begins with 05, its length, and a name with a slash in it
// (vmstate_subsection_save in migration/vmstate.c).
func parts(state []byte) (names []string) {
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

// Remaps says whether changes map again what QEMU has mapped: it has to be unmapped before, which is done by way of
// what Hosts are the state of.
func Remaps(changes []Change) bool {
	return slices.ContainsFunc(changes, func(c Change) bool { return c.Of >= 0 && c.Device() == lpcBridge })
}

// Hosts are the PCI hosts among sections.
func Hosts(sections []Section) []Section {
	return slices.DeleteFunc(slices.Clone(sections), func(s Section) bool { return s.Device() != pciHost })
}

// Commands of a migration stream (enum qemu_vm_cmd in migration/savevm.c), and what QEMU answers (enum
// mig_rp_message_type in migration/migration.h). Both are a type and a length of 16 bits each, then so many bytes.
const (
	sectionCommand = 0x08

	commandReturnPath = 1
	commandPing       = 2
	answerPong        = 2
)

// ReturnPath makes QEMU answer on the socket that it reads from.
var ReturnPath = []byte{sectionCommand, 0, commandReturnPath, 0, 0}

// Ping makes QEMU answer with Pong, when it has loaded all that stands before.
func Ping(n uint32) []byte {
	return append([]byte{sectionCommand, 0, commandPing, 0, 4}, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

// Pong is the answer to Ping.
func Pong(n uint32) []byte {
	return []byte{0, answerPong, 0, 4, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
}
