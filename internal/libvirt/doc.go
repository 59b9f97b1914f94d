// SPDX-License-Identifier: Apache-2.0

// Package libvirt works with the VMs that libvirt runs on this host: it finds them, talks to their QEMUs, starts a QEMU
// that waits for a migration, and ends one.
//
// libvirt holds the only monitor of a QEMU, and does not pass descriptors through it. Monitor makes a connection that
// behaves like a QEMU's monitor: commands go through libvirt (virDomainQemuMonitorCommand), descriptors are put into
// QEMU's process (pkg/uffd/inject, Hand), and events are those that libvirt forwards. The rest of the daemon therefore
// treats VMs of libvirt like others, except where it starts and ends them.
package libvirt
