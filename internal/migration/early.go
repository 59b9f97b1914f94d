// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"sync/atomic"
	"time"
)

// Bounds of an early load, and what comes with it.
const (
	earlyStateMost = 16 << 20 // bytes of devices' state; that of 32 devices is 2 MB
	earlyPagesMost = 32 << 20 // bytes of memory that loading reads: more is not copied while the VM stands still
	earlyTries     = 4        // as often the state is saved and loaded, until all that loading reads came with it
	// earlyTimeout bounds one try; the VM runs meanwhile. QEMU 11.1 loads sixteen devices in a second.
	earlyTimeout = 30 * time.Second
)

// errNoRoom says that other migrations have taken what early states may have of the daemon's memory.
var errNoRoom = errors.New("the early states of other migrations take all the memory that is meant for them")

// errPausedSince says that QEMU would not take the disks of a VM that is paused: it was told to leave them to cont.
var errPausedSince = withRemedy(
	errors.New("the VM was paused after the destination had loaded the state of its devices"), "migrate it again")

// earlyRoom bounds what all migrations of this process keep of early states. They are as secret as the VM's memory, and
// are nowhere but in memory.
var earlyRoom = room{most: 512 << 20}

// A room is memory of which there is only so much.
type room struct {
	most  int64
	taken atomic.Int64
}

// take has bytes of it.
func (r *room) take(bytes int) error {
	if r.taken.Add(int64(bytes)) > r.most {
		r.taken.Add(-int64(bytes))
		return errNoRoom
	}
	return nil
}

// give gives them back.
func (r *room) give(bytes int) { r.taken.Add(-int64(bytes)) }
