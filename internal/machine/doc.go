// SPDX-License-Identifier: Apache-2.0

// Package machine compares the VM at the source with the one that waits at the destination for its state. It compares
// what the QEMUs have now: devices and disks may have changed since the source was started with its command line.
//
//	source                                         destination
//	Describe: ask QEMU what the VM has   ────►     start QEMU -S -incoming defer, or attach
//	                                               Describe: ask it in the same way
//	                                               Compare: one line for each difference
//	Describe again, right before the stop,
//	and Changed: what was added and removed since
//
// The VM is not changed by any of this.
//
// Compare does not look at memory and machine types, which package migration compares, nor at the properties of
// devices: QEMU refuses the state of a device whose properties differ.
package machine
