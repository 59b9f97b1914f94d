// SPDX-License-Identifier: Apache-2.0

package postcopy

import "time"

// Every queue, batch and delay of the engine.
const (
	// defaultWorkers read faults. One is enough for a few vCPUs; a second takes over while the first
	// hands a request to gRPC. More of them share the descriptor's one wait-queue lock.
	defaultWorkers = 2

	// eventBatch is how many messages one read(2) takes: as many as vCPUs plausibly fault at once. 32 bytes
	// each.
	eventBatch = 64

	// pollBatch is how many userfaultfds with messages a worker learns of at once.
	pollBatch = 8

	// copyBytes is what one UFFDIO_COPY installs at most, unless a page is larger. The kernel holds the
	// lock of the address space meanwhile, which page faults in QEMU need too.
	copyBytes = 512 << 10

	// loadAhead is what a fault asks for, in bytes, before StartSweep: what loading the device state touches lies
	// together (option ROMs, on a PC), and the VM stands still for each of these faults.
	loadAhead = 64 << 10

	// sweepRun is what the sweep asks for at a time, in bytes, unless a page is larger: one reply, one UFFDIO_COPY.
	sweepRun = 512 << 10
	// sweepWindow is how many bytes the sweep has asked for and not got: 10 Gbit/s at a round trip of 3 ms.
	sweepWindow = 4 << 20
	// busySweepRun replaces sweepRun while a fault waits for its page; then one run is on its way at a
	// time. The sweep never stops altogether, or a guest that always faults would never be whole.
	busySweepRun = 64 << 10

	// pendingSlots bounds how many faults are timed at once, and pendingProbes where one may stand. Faults
	// beyond that are served all the same, only not timed.
	pendingSlots  = 256
	pendingProbes = 8

	// An address space that is changing answers EAGAIN until somebody has read the event. The first tries only
	// yield, the others sleep, twice as long each time.
	againYields       = 8
	againFirstSleep   = 20 * time.Microsecond
	againLongestSleep = time.Millisecond
	// goneTries is how often a range that is gone is tried again: its event may have been read by a
	// worker that had no time yet to mark the pages. With the sleeps above about a quarter of a second.
	goneTries = 256

	// laneGrace is how long Run waits at its end for the source to end the lanes.
	laneGrace = time.Second
)
