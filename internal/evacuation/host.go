// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"context"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A Host is the daemon of the host that an evacuation empties.
type Host interface {
	// VMs returns the VMs that run here at this moment.
	VMs(ctx context.Context) ([]*migratedv1.HostVM, error)
	// Check checks a VM as its migration would.
	Check(ctx context.Context, vm string) *Checked
	// Room asks a destination how much memory it has left; nil: it is of a version that does not say. An error says why
	// no VM can go there.
	Room(ctx context.Context, destination string) (*migratedv1.HostRoom, error)
	// CheckAt asks a destination whether it can take the VM, by a migration of that spec.
	CheckAt(
		ctx context.Context, vm *Checked, destination string, spec *migratedv1.MigrationSpec,
	) (warnings []string, err error)
	// Start starts a migration. Repeating it with the same id and spec has no effect.
	Start(ctx context.Context, id string, spec *migratedv1.MigrationSpec) error
	// Migration returns a migration away from this host as it is now, or as its report shows it; nil: it is unknown.
	// over says that it has also released its VM.
	Migration(id string) (view *migratedv1.Migration, over bool)
	// Cancel cancels a migration that has not handed over its VM.
	Cancel(id string) error
	// SetBandwidth limits the traffic of all VMs that leave this host together, in addition to the host's own limit;
	// 0: only the host's limit applies.
	SetBandwidth(bytesPerSecond uint64)
	// MaxOutgoing returns how many migrations may leave this host at once.
	MaxOutgoing() int
}

// Checked is the result of checking a VM.
type Checked struct {
	// Err is why the VM cannot be moved; nil: this host has no objection.
	Err error
	// Address has the form of MigrationSpec.vm.
	Address, Name string
	Warnings      []string
	// Size is the size of its memory, Held how much of that is in use.
	Size, Held Needs
	// Machine is what CheckAt sends to the destination.
	Machine *migratedv1.SourceMachine
}
