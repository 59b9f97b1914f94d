// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"encoding/binary"
)

// The section with the VM's run state (vmstate_globalstate in migration/global_state.c) is as long in every VM: after its
// header come the length of the state's name (32), which counts a zero, and 100 bytes with the name.
const (
	runStateName   = "\x0bglobalstate" // with its length before it, as in a header
	runStateHeader = len(runStateName) + 4 + 4
	// RunStateSize is how many bytes Pause needs at once, to find the run state and to change it.
	RunStateSize = runStateHeader + 4 + 100
)

// Pause changes what QEMU is still writing, and has written so far: whoever loads it is paused then. QEMU always saves
// "running", and a QEMU that loads that runs the VM by itself if somebody gave it "cont" while it waited
// (process_incoming_migration_bh in migration/migration.c). A machine that has no such section is none of ours: Parse
// refuses what was made before there was one.
func Pause(saved []byte) {
	const paused = "paused\x00"
	at := bytes.Index(saved, []byte(runStateName))
	if at < 0 || len(saved) < at+RunStateSize {
		return
	}
	state := saved[at+runStateHeader : at+RunStateSize]
	clear(state)
	binary.BigEndian.PutUint32(state, uint32(len(paused)))
	copy(state[4:], paused)
}
