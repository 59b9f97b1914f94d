// SPDX-License-Identifier: Apache-2.0

// Package process reads from the kernel, with /proc and pidfds, what is known about QEMU processes: which processes run
// VMs (Find), which one answers at a QMP socket (Behind), how each was started (Facts), and when and how it ends
// (Handle, Exit).
//
// The kernel reuses PIDs. An Identity can be stored and tells a process from a later one with the same PID. A Handle
// refers to one process as long as it is open.
//
// The package starts no QEMU; internal/qemu/launch does. internal/qemu finds the process of its VM here,
// internal/qemu/ram finds mappings, internal/migration checks whether a QEMU of an earlier run is alive, and
// internal/daemon finds the VMs of its host.
package process
