// SPDX-License-Identifier: Apache-2.0

package postcopy

import "time"

// Every queue, batch and delay of the engine.
const (
	// defaultWorkers is how many workers read faults. One is enough for a few vCPUs; a second takes over while the first
	// hands a request to gRPC. More workers share the descriptor's one wait-queue lock, as the vCPUs do.
	// docs/fault-budget.md (Shards) says what that costs, and why there is one descriptor for all of them.
	defaultWorkers = 2

	// eventBatch is how many messages one read(2) takes: as many as vCPUs plausibly fault at once. 32 bytes
	// each.
	eventBatch = 64

	// pollBatch is how many userfaultfds with messages a worker learns of at once.
	pollBatch = 8

	// copyBytes is what one UFFDIO_COPY installs at most, unless a page is larger. The kernel holds the
	// lock of the address space meanwhile, which page faults in QEMU need too.
	copyBytes = 512 << 10

	// foreseenMost is how many ranges Foresee takes: the rings of a few dozen devices.
	foreseenMost = 512
	// foreseenBytes is what one message asks for of them at most, unless a page is larger.
	foreseenBytes = 1 << 20

	// remapBytes is how many bytes are mapped at once of pages that are there and that the kernel took away: the size of a
	// huge page that it may have made of them.
	remapBytes = 2 << 20

	// predictBytes is what a guess asks for at most: a millisecond of 1 Gbit/s. The next fault waits behind it no longer
	// than a guess is worth.
	predictBytes = 128 << 10
	// A VM has a few dozen threads at most that touch its RAM; two that share an entry only disturb each other's
	// guesses.
	predictThreads = 64
	predictStreams = 4
	// firstDepth is how many pages are asked for when a stream has gone on once, and again when guesses mostly fail.
	firstDepth = 4
	// farthest is how far apart, in pages, two touches of a stream may be.
	farthest = 64
	// skipped is how many pages of a stream the sweep may have brought in between: two of its shortest runs.
	skipped = 2 * leastRun / 4096
	// trial is how many guessed pages may be wrong before guesses count as mostly wrong.
	trial = 256

	// sweepRun is what the sweep asks for at a time, in bytes, at most, unless a page is larger: one reply, one
	// UFFDIO_COPY. runTime is how long one run may keep the link busy: a fault waits that long behind it. On a long path a
	// run takes 1/runsPerTrip of a round trip, also while a thread waits. That wait is short compared to what a fault
	// takes anyway. At 1 Gbit/s and 10 ms both daemons take a sixth less CPU time than with runs of 64 KiB.
	sweepRun    = 512 << 10
	runTime     = 500 * time.Microsecond
	runsPerTrip = 8
	// leastRun is the shortest run of the sweep, in bytes. While a thread waits for a page, runs are at most half as long.
	// The sweep never stops altogether, or a guest that always faults would never be whole.
	leastRun = 64 << 10
	// pieceTime is the same for one reply while a thread waits; a reply has pagewire.LeastPiece bytes at least. The pages
	// of a run are installed as they come. So a thread that goes through memory in order, as fast as the network, waits
	// for one piece at a time and not for a run. Pieces cost CPU time, so a run is one piece where a round trip is long.
	pieceTime = 100 * time.Microsecond
	// idleQueue is for how long the sweep keeps the link busy, beyond what the link holds, while no thread waits. The
	// queue is needed because each run is read, sent, received and installed one after the other, and both daemons have to
	// be woken for it. With a queue of 192 KiB a link of 1 Gbit/s was a fifth idle. With 512 KiB a link of 10 Gbit/s
	// carried 2.7 Gbit/s, and with this queue 3.7. busyQueue is the same while a thread waits for a page, which comes
	// behind the queue. Either queue is two runs and half a round trip at least: the longer the path, the later the
	// threads of two busy hosts may be, and the less a longer queue adds to the wait of a fault. With a busyQueue of 1 ms
	// a link of 1 Gbit/s is a sixth idle under a guest that always faults; with 2 ms the slowest faults take a fifth
	// longer.
	idleQueue = 4 * time.Millisecond
	busyQueue = 1500 * time.Microsecond
	// budgetCredit is how long an unspent budget can still be spent, because timers fire late.
	budgetCredit = 10 * time.Millisecond
	// budgetBurst is how much of a budget may come at once when data follows on nothing but zeros.
	budgetBurst = 100 * time.Millisecond
	// sweepFronts is how many places the sweep goes on from, in turns.
	sweepFronts = 4
	// nearFaults is how many of the last faults that belong to no stream the sweep fetches the surroundings of: nearBytes
	// on either side.
	nearFaults = 16
	nearBytes  = 128 << 10
	// nearTrip is the longest round trip at which the sweep does so, in ns. At 10 ms, in which 1 Gbit/s carries ten times
	// as much as is near, it was worse: a guest without order had a stall p99 of 100 ms to 125 ms instead of 54 to 75.
	nearTrip = int64(2 * time.Millisecond)
	// sweepRanges is how many pieces of missing memory the sweep asks for in one message at most.
	sweepRanges = 64
	// sweepWindow is the most that the sweep may have in flight, in bytes: 10 Gbit/s at a round trip of 13 ms. Below it
	// pace.go decides. firstWindow holds before anything was measured, zeroWindow while only zeros came: data may come at
	// any moment, and a page that a thread waits for comes behind it.
	sweepWindow = 16 << 20
	zeroWindow  = 4 << 20
	firstWindow = 256 << 10
	// tripLife is how often a round trip is measured anew, but no more often than once in tripShare round trips, because
	// measuring leaves the link idle for one. The last two measurements are believed. flatProbes is how many probes in a
	// row must show no rise until the link is taken to be full.
	tripLife   = 1200 * time.Millisecond
	tripShare  = 50
	flatProbes = 3
	// pacedProbes is how many of the last probes, one a round trip, are looked at for the highest rate.
	pacedProbes = 8
	// leastShare is the least share of data that is assumed, because after zeros data may come at once.
	leastShare = 1.0 / 64

	// mostBulkLanes is how many bulk lanes there are at most, see scale.go. A source serves 64 lanes of a migration.
	mostBulkLanes = 8
	// scaleGain is how many times faster the sweep must be with a lane more. That is measured for scaleTime, or for
	// scaleTrips round trips if they are longer. If the sweep was not faster, another number is tried again after
	// scalePause, then after twice as long each time, up to scaleLongest. A trial also fails if its faults, scaleFaults at
	// least, take scaleSlower times as long.
	scaleGain    = 1.1
	scaleSlower  = 1.5
	scaleFaults  = 20
	scaleTime    = 200 * time.Millisecond
	scaleTrips   = 10
	scalePause   = 2 * time.Second
	scaleLongest = time.Minute

	// pendingSlots bounds how many faults are timed at once, and pendingProbes in how many slots one may stand. Faults
	// beyond that are served all the same, only not timed.
	pendingSlots  = 256
	pendingProbes = 8

	// An address space that is changing answers EAGAIN until somebody has read the event. The first tries only
	// yield, the others sleep, twice as long each time.
	againYields       = 8
	againFirstSleep   = 20 * time.Microsecond
	againLongestSleep = time.Millisecond
	// goneTries is how often a range that is gone is tried again: its event may have been read by a worker that had no
	// time yet to mark the pages. With the sleeps above that takes about a quarter of a second.
	goneTries = 256

	// laneGrace is how long Run waits at its end for the source to end the lanes.
	laneGrace = time.Second
)
