// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The migration capabilities of QEMU that this package uses (qapi/migration.json, MigrationCapability).
const (
	// capEvents makes QEMU report each step in a MIGRATION event, so that no polling is needed.
	capEvents = "events"
	// capLateBlock leaves the disks to the source until cont at the destination.
	capLateBlock = "late-block-activate"
)

// Settings are the settings of QEMU's own migrations that PrepareIncoming changes. The fields that it leaves alone are
// for daemons that speak only protocol 1: they changed those as well, at both ends.
type Settings struct {
	Capabilities  map[string]bool `json:"capabilities"`
	MaxBandwidth  uint64          `json:"max_bandwidth"` // bytes per second; 0: not changed
	NoDescription *bool           `json:"no_description,omitempty"`
	// AnnounceRounds is how many times QEMU announces the VM's network cards after a load.
	AnnounceRounds *uint64 `json:"announce_rounds,omitempty"`
}

// Changed returns the settings that Close will restore, or nil if there are none. A later process passes them to
// PutBack, and its Close restores them instead.
func (vm *VM) Changed() *Settings { return vm.restore }

// PutBack makes Close restore these settings.
func (vm *VM) PutBack(s *Settings) { vm.restore = s }

// PrepareIncoming prepares a QEMU that was started with -incoming defer for BeginLoading. It switches every other
// capability off: with multifd, compress or postcopy-ram QEMU would expect another stream format.
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
	if vm.restore == nil { // else this is a second try, and before is not the original state
		vm.restore = &Settings{Capabilities: changed, AnnounceRounds: &parameters.AnnounceRounds}
	}
	// A load does not mean that the VM will run here, so QEMU should not announce it then; BeginAnnouncing does it when
	// that is certain. One round stays configured, and QEMU keeps it until the VM runs. Zero rounds are not safe:
	// virtio-net then has no timer after the load (virtio_net_post_load_device), and QEMU ends when the guest resets
	// the device (virtio_net_reset).
	return vm.apply(ctx, Settings{Capabilities: now, AnnounceRounds: new(uint64(1))})
}

// TakeDisksWhenLoaded makes QEMU take the VM's disks from the source at the end of the load instead of at Cont. A VM
// that arrives paused may never run here, and a QEMU without the disks could not be moved on. QEMU 10.0 and newer still
// waits for cont: call ActivateDisks there.
func (vm *VM) TakeDisksWhenLoaded(ctx context.Context) error {
	return vm.SetCapabilities(ctx, map[string]bool{capLateBlock: false})
}

// BeginAnnouncing makes the VM's network cards announce themselves, as QEMU does after its own migrations: at once and
// four more times within half a second, by RARP and, where the guest supports it, by the guest itself. While the VM is
// stopped, QEMU queues the announcements (qemu_net_queue_send), and Cont sends them before anything else
// (net_vm_change_state_handler). wait waits for QEMU's answer.
func (vm *VM) BeginAnnouncing(ctx context.Context) (wait func(context.Context) error, err error) {
	return vm.QMP.Begin(ctx, "announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 100})
}

// capabilities returns the capabilities that this QEMU knows, and whether each is on.
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

// SetCapabilities switches migration capabilities on and off. On an error QEMU has changed none of them.
func (vm *VM) SetCapabilities(ctx context.Context, states map[string]bool) error {
	list := make([]capability, 0, len(states))
	for name, on := range states {
		list = append(list, capability{name, on})
	}
	// QEMU checks the list in order, and some capabilities require that another is off. So those to switch off come first.
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
