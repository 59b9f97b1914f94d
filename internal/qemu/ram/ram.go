// SPDX-License-Identifier: Apache-2.0

// Package ram handles the memory of a VM in a running QEMU. It finds where each block is (Blocks), which files hold the
// blocks and whether these can be removed (Files, OpenFile), and which other processes map them (CheckAlone). It
// empties a destination's memory before pages arrive (Drop), and keeps QEMU from emptying a source's
// (KeepWhenQEMUEnds).
//
// QEMU lists its blocks ("info ramblock"), and each address is compared with /proc/PID/maps. QEMU before 8.1 does not
// report the addresses; the package then searches QEMU's heap for them.
//
// internal/qemu gives each VM its Memory, internal/qemu/check uses it to decide whether a VM can be moved, and
// internal/migration empties the destination's memory and opens the source's files.
package ram

import (
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// Memory is the memory of one QEMU.
type Memory struct {
	qmp     *qmp.Client
	process *process.Handle
	heap    heapSearch
}

// Of returns the memory of the QEMU that answers on client and whose process is qemu. Both stay the caller's.
func Of(client *qmp.Client, qemu *process.Handle) *Memory { return &Memory{qmp: client, process: qemu} }
