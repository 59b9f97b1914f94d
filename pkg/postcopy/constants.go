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

	// foreseenMost is how many stretches Foresee takes: the rings of a few dozen devices.
	foreseenMost = 512
	// foreseenBytes is what one message asks for of them at most, unless a page is larger.
	foreseenBytes = 1 << 20

	// remapBytes is what is mapped at once of pages that are there and that the kernel took away: what it makes one huge
	// page of.
	remapBytes = 2 << 20

	// predictBytes is what a guess asks for at most: a millisecond of 1 Gbit/s, so that the next fault does not wait longer
	// behind it than a guess is worth.
	predictBytes = 128 << 10
	// A VM has a few dozen threads at most that touch its RAM; two that share an entry only disturb each other's guesses.
	predictThreads = 64
	predictStreams = 4
	// firstDepth is how many pages are asked for when a stream has gone on once, and again when guesses mostly fail.
	firstDepth = 4
	// farthest is how far apart, in pages, two touches of a stream may be.
	farthest = 64
	// skipped is how many pages of a stream may have come without it: a run of the sweep.
	skipped = 2 * leastRun / 4096
	// trial is how many guessed pages may fail before it is said that guesses mostly fail.
	trial = 256

	// sweepRun is what the sweep asks for at a time, in bytes, at most, unless a page is larger: one reply, one UFFDIO_COPY.
	// runTime is how long the link may be busy with one: what a fault waits behind it.
	sweepRun = 512 << 10
	runTime  = 500 * time.Microsecond
	// leastRun is the least that it asks for, and half of the above is the most while a thread waits for a page. The sweep
	// never stops altogether, or a guest that always faults would never be whole.
	leastRun = 64 << 10
	// idleQueue is for how long the sweep keeps the link busy, beyond what that holds, while nobody waits: each run is read,
	// sent, received and installed one after the other, and both daemons have to be woken for it. With 192 KiB a link of
	// 1 Gbit/s was a fifth idle; with 512 KiB one of 10 Gbit/s carried 2.7, and with this 3.7. busyQueue is the same while a
	// thread waits for a page, which comes behind it; two runs and a quarter of a round trip at least. With 1 ms a link of
	// 1 Gbit/s is a sixth idle under a guest that always faults, with 2 ms the slowest faults take a fifth longer.
	idleQueue = 4 * time.Millisecond
	busyQueue = 1500 * time.Microsecond
	// budgetCredit is for how long a budget that was not spent may be spent later: timers wake late.
	budgetCredit = 10 * time.Millisecond
	// budgetBurst is how much of a budget may come at once when data follows on nothing but zeros.
	budgetBurst = 100 * time.Millisecond
	// sweepFronts is from how many places the sweep goes on, in turns.
	sweepFronts = 4
	// sweepRanges is how many pieces of missing memory the sweep asks for in one message at most.
	sweepRanges = 64
	// sweepWindow is how many bytes the sweep has asked for and not got at most: 10 Gbit/s at a round trip of 3 ms. Below it
	// pace.go decides; firstWindow is before anything was measured.
	sweepWindow = 4 << 20
	firstWindow = 256 << 10
	// pacedProbes is of how many probes, one a round trip, the highest rate counts.
	pacedProbes = 8
	// leastShare is the share of data that is assumed at least: after zeros data may come at once.
	leastShare = 1.0 / 64

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
