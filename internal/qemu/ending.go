// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"sync"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// An Ending is the content of QEMU's event SHUTDOWN, which QEMU sends when its VM ends.
type Ending struct {
	// Guest is true when the guest asked for the end.
	Guest bool `json:"guest"`
	// Reason is ShutdownCause in qapi/run-state.json: "guest-shutdown", "host-qmp-quit", ...
	Reason string `json:"reason"`
}

// Ending returns the content of the last SHUTDOWN event since Attach, or nil if there was none. A VM whose QEMU has
// -no-shutdown can go on after that event, as libvirt has it do for a reboot: Ending returns nil after a later RESET or
// RESUME. Once the connection has ended, the result no longer changes.
func (vm *VM) Ending() *Ending {
	select {
	case <-vm.QMP.Done():
		<-vm.endings.followed // all that QEMU said has been read
	default:
	}
	vm.endings.mu.Lock()
	defer vm.endings.mu.Unlock()
	return vm.endings.last
}

// Continued returns a channel that is closed when QEMU has said that the VM was continued since Attach. Once Ending has
// returned after the end of the connection, that does not change any more.
func (vm *VM) Continued() <-chan struct{} { return vm.endings.continued }

// endings follows the events that say whether the VM has ended. It reads them at once, because a guest can cause any
// number of them and a subscription keeps only the oldest.
type endings struct {
	followed  chan struct{} // closed when the connection has ended and all events have been read
	resumed   sync.Once     // closes continued
	continued chan struct{} // closed at the first RESUME
	mu        sync.Mutex    // guards last
	last      *Ending       // nil: the VM has not ended, or went on since
}

// followEndings starts to follow the endings of a VM until the connection ends.
func followEndings(client *qmp.Client) *endings {
	e := &endings{followed: make(chan struct{}), continued: make(chan struct{})}
	go e.follow(client.Subscribe("SHUTDOWN", "RESET", "RESUME"))
	return e
}

func (e *endings) follow(events *qmp.Subscription) {
	defer close(e.followed)
	for event := range events.Events() {
		e.note(event)
	}
	if events.Dropped() > 0 { // whether the VM went on is not known
		e.set(nil)
	}
}

// note records an event.
func (e *endings) note(event qmp.Event) {
	if event.Name == "RESUME" {
		e.resumed.Do(func() { close(e.continued) })
	}
	if event.Name != "SHUTDOWN" { // the VM goes on
		e.set(nil)
		return
	}
	said := new(Ending)
	if json.Unmarshal(event.Data, said) == nil { // QEMU sends no other form
		e.set(said)
	}
}

func (e *endings) set(last *Ending) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last = last
}
