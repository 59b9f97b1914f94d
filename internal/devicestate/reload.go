// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"fmt"
	"slices"
	"strings"
)

// twice are the devices whose state QEMU 7.2, 10.0 and 11.1 load a second time, once it has changed. QEMU loads sections as
// they come, and nearly no device minds: COLO loads all of them again and again. TestLoadedTwice (e2e/twice) holds this
// list against each of the three. A device that is not in it may mind, so a VM that has one is loaded once.
var twice = []string{
	// of every PC
	"timer", "cpu_common", "cpu", "apic", "kvm-tpr-opt", "fw_cfg", "PCIHost", "PCIBUS", "dma", "i8259", "ioapic", "hpet",
	"mc146818rtc", "i8254", "pcspk", "serial", "ps2kbd", "ps2mouse", "pckbd", "vmmouse", "port92", "i2c_bus",
	"acpi_build", "globalstate",
	"mch", lpcBridge, "ich9_ahci", "ich9_smb", // q35
	"I440FX", "PIIX3", "piix4_pm", "ide", "fdc", // pc
	// disks, network cards and what else is plugged in
	"pcie-root-port",
	"virtio-net", "virtio-blk", "virtio-scsi", "virtio-console", "virtio-balloon", "virtio-rng", "virtio-input", "virtio-gpu",
	"scsi-disk", "e1000e", "e1000", "rtl8139", "vmxnet3", "lsiscsi", "megasas", "pvscsi",
	"vga", "xhci", "ehci", "usb-ptr", "usb-kbd", "usb-storage", "intel-hda", "hda-audio", "i6300esb_wdt", "slirp",
}

const (
	// lpcBridge is that of a q35. Loading it maps its root complex registers, and ends QEMU if they are mapped already
	// (ich9_lpc_post_load in hw/isa/lpc_ich9.c): see Remaps.
	lpcBridge = "ICH9LPC"
	// pciHost has the address to which the next access of PCI configuration space goes.
	pciHost = "PCIHost"
)

// Twice are all devices that can be loaded twice.
func Twice() []string { return slices.Clone(twice) }

// Device is the name of the kind of device, without the place where one is plugged in: "virtio-net" of
// "0000:00:16.0:00.0/virtio-net".
func (s Section) Device() string { return s.Name[strings.LastIndexByte(s.Name, '/')+1:] }

// CheckTwice names a device of which it is not known whether it can be loaded while the VM still runs elsewhere, and again
// when it has stopped.
func CheckTwice(all []Section) error {
	for _, s := range all {
		if !slices.Contains(twice, s.Device()) {
			return fmt.Errorf("it is not known whether QEMU can load the state of %q twice", s.Name)
		}
	}
	return nil
}

// Remaps says whether changes map again what QEMU has mapped: it has to be unmapped before, which is done by way of what
// Hosts are the state of.
func Remaps(changes []Change) bool {
	return slices.ContainsFunc(changes, func(c Change) bool { return c.Of >= 0 && c.Device() == lpcBridge })
}

// Hosts are the PCI hosts among sections.
func Hosts(sections []Section) []Section {
	return slices.DeleteFunc(slices.Clone(sections), func(s Section) bool { return s.Device() != pciHost })
}

// Commands of a migration stream (enum qemu_vm_cmd in migration/savevm.c), and what QEMU answers (enum mig_rp_message_type
// in migration/migration.h). Both are a type and a length of 16 bits each, then so many bytes.
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
