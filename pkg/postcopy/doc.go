// SPDX-License-Identifier: Apache-2.0

// Package postcopy fills the memory of a VM that already runs, on the destination host.
//
// In the way of one page fault it is the beginning and the end:
//
//	[1 event read ─► 2 claim, lane request] ─► 3 page server ─► 4 receive ─► [5 UFFDIO_COPY]
//
// What runs in parallel, and where to read it:
//
//	  QEMU's threads: vCPUs, devices                                       source
//	    │ touch a missing page        ▲ wake
//	    ▼                             │
//	┌─ userfaultfd ───────────────────┴────────────────┐
//	└──┬───────────────────────────────────────────▲───┘
//	   │ 1 epoll_wait(2), read(2): up to           │ 5 UFFDIO_COPY, UFFDIO_ZEROPAGE
//	   │   eventBatch messages                     │
//	   ▼                                           │
//	┌─ fault worker ──────────┐          ┌─ receiver ─┴────────────┐
//	│ one thread each         │          │ one thread a lane       │
//	│ 2 claim in the page     │ demand   │ 4 Recv                  │  demand   ┌────────────┐
//	│   table, Send           ├─ lane ──►│   claim in the page     │◄─ lanes ──┤ 3 page     │
//	│ (fault.go)              │ (gRPC)   │   table, install        │           │   server   │
//	└─────────────────────────┘          │ (install.go)            │           │ (pagesrv)  │
//	                                     │                         │   bulk    │            │
//	                                     │ and the sweep, which    │◄─ lane ──►│            │
//	                                     │ also asks (sweep.go)    │           └────────────┘
//	                                     └─────────────────────────┘
//
// Each of them sleeps in a system call, for which the program may give Go's runtime a processor more (Options.Sleeps).
// None hands anything to another: a thread that the kernel wakes does all there is to do until it sleeps again. Waking
// a thread costs more than anything else that is done for a page (docs/fault-budget.md).
//
// Read fault.go, lane.go of package pagesrv, then install.go: their functions stand in the order in which a fault meets
// them. Between them is a lane (package pagelane), which sends and receives messages and no more. predict.go guesses
// what a thread will fault on next. bulk.go and scale.go say how many lanes the sweep has and what they share, pace.go
// how much the sweep may ask for without being in the way of faults, and budget.go how much of the network sweep and
// guesses may take in a second. pages.go holds the states of all pages and the picture of their changes, arrival.go has
// the changes of a page that comes, and takeup.go says what becomes of those that an earlier process left. session.go
// starts and ends the goroutines, engine.go holds what outlives them, and constants.go has every size and delay.
//
// On the way of a fault nothing takes a lock (but for pages of 1 GiB, see gigantic.go), nothing of ours is allocated,
// and no goroutine is started. One compare-and-swap in the page table decides which goroutine asks for a page, and
// which one installs it.
//
// # Zero pages stay holes
//
// Guest RAM is shared memory (tmpfs or hugetlbfs), where UFFDIO_ZEROPAGE allocates a page. So a page that the sweep
// learns to be zero is only marked: once all memory is in and unregistered, the hole reads as zero by itself, and a
// sparse VM stays sparse. A zero page is installed only where a thread waits in the hole, and then at once.
//
// For a VM of 1 TiB with hardly anything in it, asking for each page of a hole would take the better part of a minute.
// So a source that is asked for pages beside a hole tells of all of that hole, and of the next ones. The table takes
// them in by words (holes.go). These pages were not asked for, so they are not in flight, and pace.go does not count
// them.
//
// # Pages that the process gives up
//
// A balloon, free page reporting or virtio-mem discards pages. Such a page is zero from then on. Only content that is
// being installed at that moment can still come back, which is not wrong: discard.go says why, and what is found if the
// process is killed meanwhile.
//
// # Pages that another process touches
//
// Another process that maps the RAM file gets pages of zeros where the VM's pages have not come, and the kernel would
// let the VM find these zeros. others.go says what prevents that.
//
// # When it cannot go on
//
// Whatever fails, missing pages stay registered: threads that need one wait, none reads a zero in its place. The next
// Run begins with waking them all. They fault again, so the engine does not have to remember which threads waited.
package postcopy
