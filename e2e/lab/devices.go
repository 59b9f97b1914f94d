// SPDX-License-Identifier: Apache-2.0

package lab

import "fmt"

// slots assigns PCI devices their slots, the same on every host.
type slots struct {
	rootPorts bool
	ports     int
	args      []string
}

// firstPort is the slot of the first root ports. functionsOfSlot root ports share a slot.
const (
	firstPort       = 0x10
	functionsOfSlot = 8
)

// device adds a PCI Express device. If the VM has root ports, the device gets its own port.
func (s *slots) device(spec string) {
	if s.rootPorts {
		n := s.ports
		s.ports++
		s.args = append(s.args, "-device", fmt.Sprintf(
			"pcie-root-port,id=rp%d,chassis=%d,slot=%d,bus=pcie.0,addr=%#x.%#x,multifunction=on",
			n, n+1, n+1, firstPort+n/functionsOfSlot, n%functionsOfSlot))
		spec += fmt.Sprintf(",bus=rp%d", n)
	}
	s.args = append(s.args, "-device", spec)
}

// deviceArgs are the VM's devices.
func (c VMConfig) deviceArgs() []string {
	s := &slots{rootPorts: c.RootPorts}
	if c.VGA {
		s.args = append(s.args, "-device", "VGA,id=vga") // a conventional PCI device: root ports do not take it
	}
	if c.Balloon || c.FreePageReporting {
		balloon := "virtio-balloon-pci,id=balloon"
		if c.FreePageReporting {
			balloon += ",free-page-reporting=on"
		}
		s.device(balloon)
	}
	if c.RNG {
		s.args = append(s.args, "-object", "rng-random,id=random,filename=/dev/urandom")
		s.device("virtio-rng-pci,id=rng,rng=random")
	}
	c.diskArgs(s)
	c.nicArgs(s)
	return s.args
}

// deviceParams are kernel parameters that tell the Linux guest its devices. KernelArgs can override them.
func (c VMConfig) deviceParams() []string {
	var params []string
	if c.Disks > 0 {
		params = append(params, fmt.Sprintf("migrated.disks=%d", c.Disks))
	}
	if c.NICs > 0 {
		params = append(params, fmt.Sprintf("migrated.nets=%d", c.NICs))
	}
	return params
}

// RealVM is a typical VM: two vCPUs, QEMU's default memory, and the devices of Real.
func RealVM(kernel, initrd string, memoryMiB, disks, nics int, args ...string) VMConfig {
	return VMConfig{VCPUs: 2, MemoryMiB: memoryMiB, Backend: BackendDefault}.Real(kernel, initrd, disks, nics, args...)
}

// Real returns the VM with the devices of WithDevices and a Linux guest that uses them at a moderate rate. Its images
// must have the virtio drivers. args are further arguments of its kernel command line.
func (c VMConfig) Real(kernel, initrd string, disks, nics int, args ...string) VMConfig {
	c = c.WithDevices(disks, nics)
	c.Kernel, c.Initrd = kernel, initrd
	c.KernelArgs = append([]string{"migrated.disk-rate=200", "migrated.net-rate=100"}, args...)
	return c
}

// WithDevices returns the VM with the devices that most VMs have, for any guest: writable disks, network cards, a
// balloon, a random number generator and a screen. Each device that can be gets its own root port.
func (c VMConfig) WithDevices(disks, nics int) VMConfig {
	c.Disks, c.NICs, c.RootPorts, c.Balloon, c.RNG, c.VGA = disks, nics, true, true, true, true
	return c
}
