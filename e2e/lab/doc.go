// SPDX-License-Identifier: Apache-2.0

// Package lab makes hosts from namespaces. Each has its own network, /run,
// /dev/shm and /dev/hugepages, and a virtual cable joins them. So two real
// daemons and two real QEMUs on one machine see what they would see
// on two. The cable can be an emulated [Link], as slow and as bad as a real
// network. Nothing outside the namespaces is reachable from them.
//
// The hosts share one directory of the machine's file system, for the disks of
// their VMs. The VMs' network cards are connected to a third
// host, C, from which a [Pinger] sees what their users would see.
//
// When the lab is closed, it ends by pid every process that it started.
package lab
