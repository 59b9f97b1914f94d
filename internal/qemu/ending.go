// SPDX-License-Identifier: Apache-2.0

package qemu

import "encoding/json"

// An Ending is what QEMU says when its VM ends: the event SHUTDOWN.
type Ending struct {
	// Guest says that the guest asked for it.
	Guest bool `json:"guest"`
	// Reason is ShutdownCause in qapi/run-state.json: "guest-shutdown", "host-qmp-quit", ...
	Reason string `json:"reason"`
}

// Ending is the last that QEMU has said of it since Attach; nil: nothing. When the connection has ended it has said all.
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
			if json.Unmarshal(e.Data, said) == nil { // QEMU writes nothing else
				vm.ending = said
			}
		default:
			return vm.ending
		}
	}
}
