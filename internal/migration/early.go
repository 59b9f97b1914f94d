// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"sync/atomic"
	"time"
)

// Bounds of an early load and of the memory that comes with it.
const (
	earlyStateMost = 16 << 20 // bytes of device state; 32 devices have 2 MB
	earlyPagesMost = 32 << 20 // bytes of memory that loading reads; no more is copied while the VM is stopped
	earlyTries     = 4        // how often the state is saved and loaded until all memory that loading reads came with it
	// earlyTimeout bounds one try. The VM runs meanwhile. QEMU 11.1 loads sixteen devices in a second.
	earlyTimeout = 30 * time.Second
)

// errNoRoom says that the early states of other migrations use all of earlyRoom.
var errNoRoom = errors.New("early states of other migrations use all memory reserved for early states")

// errPausedSince says that a VM was paused after its early load. QEMU was told then to leave the disks to cont, so it
// would not take them for a paused VM.
var errPausedSince = withRemedy(
	errors.New("the VM was paused after the destination had loaded the state of its devices"), "migrate it again")

// earlyRoom bounds the early states that all migrations of this process hold. They are as secret as the VM's memory
// and are never written to disk.
var earlyRoom = byteLimit{most: 512 << 20}

// A byteLimit counts bytes in use, of which there may be at most most.
type byteLimit struct {
	most  int64
	taken atomic.Int64
}

// take reserves bytes, or fails if there are not enough left.
func (r *byteLimit) take(bytes int) error {
	if r.taken.Add(int64(bytes)) > r.most {
		r.taken.Add(-int64(bytes))
		return errNoRoom
	}
	return nil
}

// give returns bytes that take reserved.
func (r *byteLimit) give(bytes int) { r.taken.Add(-int64(bytes)) }
