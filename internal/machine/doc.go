// SPDX-License-Identifier: Apache-2.0

// Package machine compares two VMs: the one at the source as it is now, whatever its command line said when it was
// started, and the one that waits at the destination to become it.
//
//	source                                         destination
//	Describe: ask QEMU what the VM has   ────►     start QEMU -S -incoming defer, or attach
//	                                               Describe: ask it in the same way
//	                                               Compare: one line for each difference
//	Describe again, right before the stop,
//	and Changed: what has come and gone since
//
// Nothing of the VM is touched for it. A VM whose disk was replaced by a snapshot, into which a device was plugged, or
// whose CD was changed differs from what its command line makes, and only its QEMU knows.
//
// Compare has no opinion about memory and machine types, which package migration matches, and none about properties of
// devices: the state of a device that differs in one does not load.
package machine
