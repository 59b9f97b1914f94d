// SPDX-License-Identifier: Apache-2.0

package lab

import "fmt"

// slots gives PCI devices their places, the same on every host.
type slots struct {
	rootPorts bool
	ports     int
	args      []string
}

// firstPort is the slot of the first root ports; functionsOfSlot share one.
const (
	firstPort       = 0x10
	functionsOfSlot = 8
)

// device adds a PCI Express device, behind a port of its own where the VM has them.
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
		s.args = append(s.args, "-device", "VGA,id=vga") // a PCI device of before PCI Express: no root port takes it
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

// deviceParams tell the Linux guest of its devices. KernelArgs may say otherwise.
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

// RealVM is a VM as most are: two vCPUs, memory that is QEMU's own, and all that Real gives it.
func RealVM(kernel, initrd string, memoryMiB, disks, nics int, args ...string) VMConfig {
	return VMConfig{VCPUs: 2, MemoryMiB: memoryMiB, Backend: BackendDefault}.Real(kernel, initrd, disks, nics, args...)
}

// Real is the VM with the devices of WithDevices. Its guest is Linux, of images that have virtio's drivers, and has
// them at work at a moderate rate; args are further ones of its kernel command line.
func (c VMConfig) Real(kernel, initrd string, disks, nics int, args ...string) VMConfig {
	c = c.WithDevices(disks, nics)
	c.Kernel, c.Initrd = kernel, initrd
	c.KernelArgs = append([]string{"migrated.disk-rate=200", "migrated.net-rate=100"}, args...)
	return c
}

// WithDevices is the VM with what most have, whatever its guest: writable disks, network cards, a balloon, random
// numbers and a screen, each that can be behind a port of its own.
func (c VMConfig) WithDevices(disks, nics int) VMConfig {
	c.Disks, c.NICs, c.RootPorts, c.Balloon, c.RNG, c.VGA = disks, nics, true, true, true, true
	return c
}
