// SPDX-License-Identifier: Apache-2.0

// Package lab makes hosts out of namespaces: each has a network, a /run, a
// /dev/shm and a /dev/hugepages of its own, joined by a virtual cable, so that
// two real daemons and two real QEMUs on one machine see what they would see
// on two. The cable can be an emulated [Link], as slow and as bad as a real
// network. Nothing outside the namespaces is reachable from them.
//
// The hosts see one directory of the machine's file system, which is the storage
// that their VMs' disks are on. The VMs' network cards are joined to a third
// host, C, from which a [Pinger] sees what their users would.
//
// Whatever the lab started it ends, by pid, when it is closed.
package lab
