// SPDX-License-Identifier: Apache-2.0

// Package libvirt has to do with the VMs that a libvirtd of this host runs: it finds them, speaks to their QEMUs,
// starts one that waits for a migration, and ends one.
//
// libvirt holds a QEMU's only monitor, and no descriptor passes through it. Monitor makes a connection that looks like
// a monitor all the same: what is said on it goes through libvirt (virDomainQemuMonitorCommand), descriptors are put
// into QEMU's process (pkg/uffd/inject, Hand), and QEMU's events come from libvirt's. So nothing above this package
// knows of libvirt but where a VM begins and ends.
package libvirt
