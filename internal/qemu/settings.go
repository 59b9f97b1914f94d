// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// QEMU's migration capabilities that we use (qapi/migration.json, MigrationCapability).
const (
	// capEvents makes QEMU report each step by a MIGRATION event, so that nobody has to ask.
	capEvents = "events"
	// capIgnoreShared keeps RAM that is shared with other processes out of the stream: we move it.
	capIgnoreShared = "x-ignore-shared"
	// capLateBlock leaves a destination's disks to the source until cont.
	capLateBlock = "late-block-activate"
)

// maxBandwidth, in bytes per second, is a limit that nothing reaches: QEMU sleeps between portions of
// its stream to keep to it, and the default of 128 MiB/s would make the VM wait for that.
const maxBandwidth = 1 << 40

// Settings are those of QEMU's settings for its own migrations that PrepareOutgoing and PrepareIncoming change.
type Settings struct {
	Capabilities map[string]bool `json:"capabilities"`
	MaxBandwidth uint64          `json:"max_bandwidth"`
	// NoDescription leaves out the stream's own description in JSON, which is for debuggers: a third of the
	// stream, made and read while the VM stands still. Both ends must agree. nil: this machine has no
	// such setting (it is a property of the PC machines).
	NoDescription *bool `json:"no_description,omitempty"`
}

// Changed returns what Close puts back, nil where that is nothing. With PutBack the Close of a later process
// does it instead.
func (vm *VM) Changed() *Settings { return vm.restore }

// PutBack makes Close put these settings back.
func (vm *VM) PutBack(s *Settings) { vm.restore = s }

// descriptionProperty is the machine's property behind NoDescription.
const descriptionProperty = "suppress-vmdesc"

// PrepareOutgoing sets a source QEMU up for MigrateFD. Close puts back what it changes.
func (vm *VM) PrepareOutgoing(ctx context.Context) error {
	return vm.prepare(ctx, capEvents, capIgnoreShared)
}

// PrepareIncoming sets a destination QEMU up for MigrateIncomingFD: one that was started with -incoming
// defer.
func (vm *VM) PrepareIncoming(ctx context.Context) error {
	if err := vm.prepare(ctx, capEvents, capIgnoreShared, capLateBlock); err != nil {
		return err
	}
	return vm.warmHeap(ctx)
}

// warmHeap makes QEMU touch memory that it will need to load the device state. Loading rebuilds the memory
// map for one device after the other: some 500 pages of fresh heap, every one of them a page fault while the
// VM stands still. The answer to query-qmp-schema, the largest that QEMU has, is built of small objects in
// the same thread and freed; malloc keeps them, as its trim threshold follows the largest string freed
// (mallopt(3), M_TRIM_THRESHOLD).
func (vm *VM) warmHeap(ctx context.Context) error {
	return vm.QMP.Do(ctx, "query-qmp-schema", nil, nil)
}

// prepare switches the wanted capabilities on and every other off: multifd, compress or postcopy-ram
// would need another stream than ours.
func (vm *VM) prepare(ctx context.Context, want ...string) error {
	before, err := vm.settings(ctx)
	if err != nil {
		return err
	}
	if missing := lacking(before.Capabilities, want...); len(missing) > 0 {
		return missingCapabilities(vm.QMP.Version(), missing)
	}
	now := Settings{Capabilities: make(map[string]bool), MaxBandwidth: maxBandwidth}
	if before.NoDescription != nil {
		yes := true
		now.NoDescription = &yes
	}
	for name, on := range before.Capabilities {
		if on && !slices.Contains(want, name) {
			now.Capabilities[name] = false
		}
	}
	for _, name := range want {
		now.Capabilities[name] = true
	}
	if vm.restore == nil { // else this is a second try, and before is not what we found
		vm.restore = &before
	}
	return vm.apply(ctx, now)
}

func missingCapabilities(v qmp.Version, missing []string) error {
	return fmt.Errorf("QEMU %s lacks the migration capability %s: use QEMU 4.0 or newer", v, strings.Join(missing, ", "))
}

func lacking(have map[string]bool, want ...string) (missing []string) {
	for _, name := range want {
		if _, exists := have[name]; !exists {
			missing = append(missing, name)
		}
	}
	return missing
}

func (vm *VM) settings(ctx context.Context) (Settings, error) {
	s := Settings{}
	var err error
	if s.Capabilities, err = vm.capabilities(ctx); err != nil {
		return s, err
	}
	var parameters struct {
		MaxBandwidth uint64 `json:"max-bandwidth"`
	}
	if err := vm.QMP.Do(ctx, "query-migrate-parameters", nil, &parameters); err != nil {
		return s, err
	}
	s.MaxBandwidth = parameters.MaxBandwidth
	var none bool
	switch err := vm.property(ctx, "/machine", descriptionProperty, &none); {
	case err == nil:
		s.NoDescription = &none
	case !errors.Is(err, qmp.ErrGeneric):
		return s, err
	}
	return s, nil
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
	capErr := vm.SetCapabilities(ctx, s.Capabilities)
	parameters := map[string]any{"max-bandwidth": s.MaxBandwidth}
	err := errors.Join(capErr, vm.QMP.Do(ctx, "migrate-set-parameters", parameters, nil))
	if s.NoDescription == nil {
		return err
	}
	property := map[string]any{"path": "/machine", "property": descriptionProperty, "value": *s.NoDescription}
	return errors.Join(err, vm.QMP.Do(ctx, "qom-set", property, nil))
}
