// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"encoding/binary"
)

// The section with the VM's run state (vmstate_globalstate in migration/global_state.c) has the same length in every
// VM. After its header come the length of the state's name with its final zero (32), and 100 bytes with the name.
const (
	runStateName   = "\x0bglobalstate" // after its length, as in a header
	runStateHeader = len(runStateName) + 4 + 4
	// RunStateSize is how many bytes Pause must see at once to find the run state and change it.
	RunStateSize = runStateHeader + 4 + 100
)

// Pause changes the run state in saved to "paused", once all of it is there; saved may be incomplete, because QEMU is
// still writing it. QEMU always saves "running", and a QEMU that loads this runs the VM by itself if it was given
// "cont" while it waited (process_incoming_migration_bh in migration/migration.c). All machine types that Parse accepts
// have the section.
func Pause(saved []byte) {
	const paused = "paused\x00"
	start := bytes.Index(saved, []byte(runStateName))
	if start < 0 || len(saved) < start+RunStateSize {
		return
	}
	state := saved[start+runStateHeader : start+RunStateSize]
	clear(state)
	binary.BigEndian.PutUint32(state, uint32(len(paused)))
	copy(state[4:], paused)
}
