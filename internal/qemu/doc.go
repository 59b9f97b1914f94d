// SPDX-License-Identifier: Apache-2.0

// Package qemu knows QEMU: what a running one is made of, how its own migration of device state is driven,
// how a destination is started, and what keeps a VM from being moved.
//
// Facts come from two places that check each other: QMP says what QEMU believes, /proc what its process
// has. Guest RAM, for instance, is listed by query-memdev and located in /proc/PID/maps by its file.
//
// A VM is moved in this order, the caller deciding between the steps:
//
//	source                             destination
//	Attach, CheckVM, Facts
//	                                   DestinationCommand, Start (or Attach)
//	                                   Facts, PrepareIncoming, PunchRAM, then userfaultfd
//	PrepareOutgoing
//	Stop
//	MigrateFD             ── stream ──▶ MigrateIncomingFD
//	                                   Cont
//	Quit
//
// Up to Cont, CancelMigrate and Cont on the source make the VM go on there: the destination has not
// activated its disks yet (QEMU's capability late-block-activate).
package qemu
