// SPDX-License-Identifier: Apache-2.0

// Package check finds what keeps a VM from being moved, and a host from taking part, before anything is changed. VM
// looks at the VM's state, its QEMU, memory, devices and disks. Tasks looks at what the QEMU does besides running the
// VM. Host looks at the kernel and at the rights of this process. Each Result says what was found and what to do about
// it.
//
// Every migration runs these checks before it begins; "migrated check" shows the same results. internal/machine and
// internal/daemon add results of their own: whether two VMs match, certificates, libvirt.
package check
