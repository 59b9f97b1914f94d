// SPDX-License-Identifier: Apache-2.0

package twice

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// machines have, together, each device of devicestate.Twice, and more.
var machines = []struct {
	name, machine string
	kvm           bool
	devices       func(*devices)
}{
	{"q35", "q35", false, func(d *devices) {
		d.network("virtio-net-pci", d.port())
		d.network("virtio-net-pci", d.port())
		d.add("virtio-blk-pci,drive="+d.image(), d.port())
		d.add("virtio-scsi-pci,id=scsi", d.port())
		d.add("scsi-hd,drive="+d.image(), "scsi.0")
		d.add("scsi-cd", "scsi.0")
		d.add("virtio-serial-pci", d.port())
		d.add("virtio-balloon-pci", d.port())
		d.add("virtio-rng-pci", d.port())
		d.add("virtio-keyboard-pci", "")
		d.add("virtio-gpu-pci", "")
		d.network("e1000e", d.port())
		d.network("e1000", "")
		d.network("rtl8139", "")
		d.network("vmxnet3", "")
		d.add("ide-hd,drive="+d.image(), "ide.0")
		d.add("lsi53c895a,id=lsi", "")
		d.add("scsi-hd,drive="+d.image(), "lsi.0")
		d.add("megasas,id=megasas", "")
		d.add("scsi-hd,drive="+d.image(), "megasas.0")
		d.add("pvscsi,id=pvscsi", "")
		d.add("scsi-hd,drive="+d.image(), "pvscsi.0")
		d.add("VGA", "")
		d.add("qemu-xhci,id=xhci", d.port())
		d.add("usb-tablet", "xhci.0")
		d.add("usb-kbd", "xhci.0")
		d.add("usb-hub", "xhci.0")
		d.add("usb-storage,drive="+d.image(), "xhci.0")
		d.add("ich9-usb-ehci1", "")
		d.add("ich9-usb-uhci1", "")
		d.args = append(d.args, "-audiodev", "none,id=sound", "-serial", "null")
		d.add("intel-hda", "")
		d.add("hda-output,audiodev=sound", "")
		d.add("AC97,audiodev=sound", "")
		d.add("i6300esb", "")
		d.add("pcie-pci-bridge", d.port())
		d.flash()
	}},
	{"pc", "pc", false, func(d *devices) {
		d.add("ide-hd,drive="+d.image(), "ide.0")
		d.add("virtio-blk-pci,drive="+d.image(), "")
		d.network("virtio-net-pci", "")
		d.add("cirrus-vga", "")
		d.add("piix3-usb-uhci", "")
	}},
	{"q35-kvm", "q35", true, func(d *devices) {
		d.network("virtio-net-pci", d.port())
		d.add("virtio-blk-pci,drive="+d.image(), d.port())
		d.add("virtio-vga", "")
	}},
}

// devices collects arguments for QEMU.
type devices struct {
	t             *testing.T
	dir           string
	args          []string
	ports, others int
}

func (d *devices) add(device, bus string) {
	if bus != "" {
		device += ",bus=" + bus
	}
	d.args = append(d.args, "-device", device)
}

// port adds a PCI Express port and returns its name.
func (d *devices) port() string {
	name := fmt.Sprintf("port%d", d.ports)
	device := fmt.Sprintf("pcie-root-port,id=%s,chassis=%d,slot=%d,addr=%#x.%d",
		name, d.ports+1, d.ports+1, 0x18+d.ports/8, d.ports%8)
	if d.ports%8 == 0 {
		device += ",multifunction=on"
	}
	d.ports++
	d.args = append(d.args, "-device", device)
	return name
}

func (d *devices) network(card, bus string) {
	name := fmt.Sprintf("net%d", d.others)
	d.others++
	d.args = append(d.args, "-netdev", "hubport,hubid=1,id="+name)
	d.add(card+",netdev="+name, bus)
}

// image adds an image and returns its name.
func (d *devices) image() string {
	name := fmt.Sprintf("image%d", d.others)
	d.others++
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		d.t.Fatal(err)
	}
	d.args = append(d.args, "-blockdev", "driver=raw,node-name="+name+",file.driver=file,file.filename="+path)
	return name
}

// flash adds the firmware in a flash that the guest can write to.
func (d *devices) flash() {
	bios, err := os.ReadFile("/usr/share/seabios/bios-256k.bin")
	if err != nil {
		testenv.CannotRun(d.t, "the firmware, of package seabios: %v", err)
	}
	path := filepath.Join(d.dir, "flash")
	if err := os.WriteFile(path, bios, 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.args = append(d.args, "-drive", "if=pflash,format=raw,file="+path)
}
