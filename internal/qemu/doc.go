// SPDX-License-Identifier: Apache-2.0

// Package qemu knows QEMU: what a running one is made of, how the state of its devices is saved and loaded,
// how a destination is started, and what keeps a VM from being moved.
//
// Facts come from two places that check each other: QMP says what QEMU believes, /proc what its process
// has. The VM's memory, for instance, is listed by "info ramblock" and held against /proc/PID/maps.
//
// A VM is moved in this order, the caller deciding between the steps:
//
//	source                             destination
//	Attach, CheckVM, Facts
//	                                   DestinationCommand, Start (or Attach)
//	                                   Facts, PrepareIncoming, DropRAM, then userfaultfd
//	                                   LoadDevices begins
//	NewSaver
//	Stop
//	Save                  ── stream ──▶ LoadDevices ends
//	                                   Cont, Announce
//	Quit
//
// Up to Cont at the destination, Cont at the source makes the VM go on there: the destination has not
// activated its disks yet (QEMU's capability late-block-activate). Only the disks of a VM that is paused are taken when
// it is loaded (TakeDisksWhenLoaded).
package qemu
