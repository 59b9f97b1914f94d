// SPDX-License-Identifier: Apache-2.0

// Package qemu controls one VM through its QEMU, over QMP: it reads facts, stops and continues the VM, and saves and
// loads the state of its devices. internal/migration moves VMs with it; internal/machine describes them.
//
// Facts come from two sources that check each other: QMP says what QEMU believes, /proc shows what its process has.
// Everything about a QEMU besides its VM is in packages of its own. Of these, only check imports this package:
//
//	cmdline    parses QEMU's command line and makes the destination's
//	process    finds and watches QEMU's process: /proc, identity, end
//	launch     starts QEMU and reads its output
//	ram        the VM's memory, VM.RAM here
//	hugepages  whether memory may have transparent huge pages
//	qom        reads QEMU's object tree
//	check      finds what keeps a VM from being moved
//
// A migration calls these functions in this order; the caller decides between the steps:
//
//	source                             destination
//	Attach, check.VM, Facts
//	                                   cmdline.Destination, Start (or Attach)
//	                                   Facts, PrepareIncoming, RAM.Drop, then userfaultfd
//	                                   BeginLoading
//	NewSaver
//	Stop
//	Save                  ── stream ──▶ Loading.Wait ends
//	                                   BeginAnnouncing, Cont
//	Quit
//
// Until Cont at the destination, Cont at the source continues the VM there: the destination has not activated its disks
// yet (QEMU's capability late-block-activate). There is one exception: the destination of a paused VM takes the disks
// when the state is loaded (TakeDisksWhenLoaded).
package qemu
