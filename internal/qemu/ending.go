// SPDX-License-Identifier: Apache-2.0

package qemu

import "encoding/json"

// An Ending is the content of QEMU's event SHUTDOWN, which QEMU sends when its VM ends.
type Ending struct {
	// Guest is true when the guest asked for the end.
	Guest bool `json:"guest"`
	// Reason is ShutdownCause in qapi/run-state.json: "guest-shutdown", "host-qmp-quit", ...
	Reason string `json:"reason"`
}

// Ending returns the content of the last SHUTDOWN event since Attach, or nil if there was none. Once the connection has
// ended, the result no longer changes.
func (vm *VM) Ending() *Ending {
	vm.endingMu.Lock()
	defer vm.endingMu.Unlock()
	for {
		select {
		case e, open := <-vm.shutdowns.Events():
			if !open {
				return vm.ending
			}
			said := new(Ending)
			if json.Unmarshal(e.Data, said) == nil { // QEMU sends no other form
				vm.ending = said
			}
		default:
			return vm.ending
		}
	}
}
