// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// QEMU's migration capabilities that we use (qapi/migration.json, MigrationCapability).
const (
	// capEvents makes QEMU report each step by a MIGRATION event, so that nobody has to ask.
	capEvents = "events"
	// capLateBlock leaves a destination's disks to the source until cont.
	capLateBlock = "late-block-activate"
)

// Settings are those of QEMU's settings for its own migrations that PrepareIncoming changes. Daemons that speak
// protocol 1 alone changed the rest as well, at both ends.
type Settings struct {
	Capabilities  map[string]bool `json:"capabilities"`
	MaxBandwidth  uint64          `json:"max_bandwidth"` // bytes a second; 0: not changed
	NoDescription *bool           `json:"no_description,omitempty"`
	// AnnounceRounds is how often QEMU announces the VM's network cards when it has loaded.
	AnnounceRounds *uint64 `json:"announce_rounds,omitempty"`
}

// Changed returns what Close puts back, nil where that is nothing. With PutBack the Close of a later process
// does it instead.
func (vm *VM) Changed() *Settings { return vm.restore }

// PutBack makes Close put these settings back.
func (vm *VM) PutBack(s *Settings) { vm.restore = s }

// PrepareIncoming sets a destination QEMU up for LoadDevices: one that was started with -incoming defer. Every other
// capability is switched off: multifd, compress or postcopy-ram would want another stream than ours.
func (vm *VM) PrepareIncoming(ctx context.Context) error {
	before, err := vm.capabilities(ctx)
	if err != nil {
		return err
	}
	for _, name := range []string{capEvents, capLateBlock} {
		if _, exists := before[name]; !exists {
			return fmt.Errorf("QEMU %s lacks the migration capability %s: use QEMU 6.0 or newer", vm.QMP.Version(), name)
		}
	}
	now := map[string]bool{capEvents: true, capLateBlock: true}
	changed := map[string]bool{capEvents: before[capEvents], capLateBlock: before[capLateBlock]}
	for name, on := range before {
		if on && name != capEvents && name != capLateBlock {
			now[name], changed[name] = false, true
		}
	}
	var parameters struct {
		AnnounceRounds uint64 `json:"announce-rounds"`
	}
	if err := vm.QMP.Do(ctx, "query-migrate-parameters", nil, &parameters); err != nil {
		return err
	}
	if vm.restore == nil { // else this is a second try, and before is not what we found
		vm.restore = &Settings{Capabilities: changed, AnnounceRounds: &parameters.AnnounceRounds}
	}
	// That the VM runs here is not certain when it is loaded: BeginAnnouncing says so when it is. The one round that
	// is left stays in QEMU until the VM runs. With none, virtio-net has no timer once it is loaded
	// (virtio_net_post_load_device), and QEMU ends of it when the guest resets the device (virtio_net_reset).
	return vm.apply(ctx, Settings{Capabilities: now, AnnounceRounds: new(uint64(1))})
}

// TakeDisksWhenLoaded makes LoadDevices take the VM's disks from the source as soon as all is loaded, not when Cont
// runs the VM: one that arrives paused may never be run, and a QEMU without its disks could not be moved on. Since 10.0
// QEMU leaves them to cont all the same: ActivateDisks then takes them.
func (vm *VM) TakeDisksWhenLoaded(ctx context.Context) error {
	return vm.SetCapabilities(ctx, map[string]bool{capLateBlock: false})
}

// BeginAnnouncing makes the VM's network cards announce themselves, as QEMU does after a migration of its own: at once,
// and four times more within half a second, by RARP, and by the guest itself where it can. While the VM is stopped, QEMU
// keeps what it would send (qemu_net_queue_send), and Cont sends it first of all (net_vm_change_state_handler). wait waits
// for QEMU's answer.
func (vm *VM) BeginAnnouncing(ctx context.Context) (wait func(context.Context) error, err error) {
	return vm.QMP.Begin(ctx, "announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 100})
}

// capabilities are those that this QEMU knows, and whether they are on.
func (vm *VM) capabilities(ctx context.Context) (map[string]bool, error) {
	var list []capability
	if err := vm.QMP.Do(ctx, "query-migrate-capabilities", nil, &list); err != nil {
		return nil, err
	}
	known := make(map[string]bool, len(list))
	for _, c := range list {
		known[c.Name] = c.On
	}
	return known, nil
}

type capability struct {
	Name string `json:"capability"`
	On   bool   `json:"state"`
}

// SetCapabilities switches migration capabilities on and off, all of them or, with an error, none.
func (vm *VM) SetCapabilities(ctx context.Context, states map[string]bool) error {
	list := make([]capability, 0, len(states))
	for name, on := range states {
		list = append(list, capability{name, on})
	}
	// QEMU checks one after the other, and some need another to be off before.
	slices.SortFunc(list, func(a, b capability) int {
		if a.On != b.On {
			if b.On {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return vm.QMP.Do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

func (vm *VM) apply(ctx context.Context, s Settings) error {
	err := vm.SetCapabilities(ctx, s.Capabilities)
	parameters := map[string]uint64{}
	if s.MaxBandwidth != 0 {
		parameters["max-bandwidth"] = s.MaxBandwidth
	}
	if s.AnnounceRounds != nil {
		parameters["announce-rounds"] = *s.AnnounceRounds
	}
	if len(parameters) > 0 {
		err = errors.Join(err, vm.QMP.Do(ctx, "migrate-set-parameters", parameters, nil))
	}
	if s.NoDescription != nil {
		property := map[string]any{"path": "/machine", "property": "suppress-vmdesc", "value": *s.NoDescription}
		err = errors.Join(err, vm.QMP.Do(ctx, "qom-set", property, nil))
	}
	return err
}
