// SPDX-License-Identifier: Apache-2.0

// Package cmdline parses QEMU's command line as QEMU does, reads facts about a VM from it, and makes the destination's
// command line from the source's.
//
// A source's command line comes from another host. The destination therefore starts only one of its own QEMU binaries
// (FindBinary), without the options that it forbids (ParseForbidden). That QEMU waits for the VM, and its QMP socket is
// where this host wants it (Destination). A template at the destination may replace the whole command line.
//
// The package looks at no process. internal/qemu/process reads the command lines of running QEMUs, internal/qemu/launch
// starts a QEMU, internal/migration asks for the destination's command line, and internal/config checks the operator's
// settings.
package cmdline
