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
//	│ 2 claim in the page     │ demand   │ 4 RecvMsg               │  demand   ┌────────────┐
//	│   table, SendMsg        ├─ lane ──►│   claim in the page     │◄─ lanes ──┤ 3 page     │
//	│ (fault.go)              │ (gRPC)   │   table, install        │           │   server   │
//	└─────────────────────────┘          │ (install.go)            │           │ (pagesrv)  │
//	                                     │                         │   bulk    │            │
//	                                     │ and the sweep, which    │◄─ lane ──►│            │
//	                                     │ also asks (sweep.go)    │           └────────────┘
//	                                     └─────────────────────────┘
//
// Each of them sleeps in a system call, for which Go's runtime gets a processor more (package processors), and none hands
// anything to another: whoever is woken by the kernel does all there is to do until it sleeps again. Waking a thread costs more
// than anything else that is done for a page (docs/fault-budget.md).
//
// Read fault.go, lane.go of package pagesrv, then install.go: their functions stand in the order in which a fault meets them; what is
// between them is a lane (package pagelane), which sends and receives messages and no more. predict.go guesses what
// a thread will fault on next, pace.go how much the sweep may ask for without being in the way of faults, budget.go what
// both may take of the network in a second. pages.go holds the states of all pages and the picture of their changes.
// session.go starts and ends the goroutines, engine.go holds what outlives them, constants.go every size and delay.
//
// On the way of a fault nothing takes a lock (but see Options.Discards), nothing of ours is allocated,
// and no goroutine is started. What two goroutines could disagree about is decided by one
// compare-and-swap in the page table: who asks for a page, and who installs it.
//
// # Zero pages stay holes
//
// Guest RAM is shared memory (tmpfs or hugetlbfs), where UFFDIO_ZEROPAGE allocates a page. So a page that the sweep
// learns to be zero is only marked: once all memory is in and unregistered, the hole reads as zero by itself, and a
// sparse VM stays sparse. Only where a thread waits in the hole a zero page is installed, at once.
//
// # Pages that the process gives up
//
// A balloon or free page reporting discards pages (UFFD_EVENT_REMOVE): they must read as zero from then on. The
// process waits until the event is read, then drops the page. Reading it, a worker marks the page zero, so that content
// in flight is dropped when it comes, and wakes its waiters. There remains content whose copy has begun: if it lands after
// the drop, the page holds what it held before it was given up. Options.Discards closes this by keeping copies and
// reads of messages apart (gate.go), which can make a fault wait for a copy of 512 KiB, some 0.1 ms. Without it the
// guest may find old content of its own in a page that it gave up during the migration, never another's: for a balloon
// and for free page reporting, whose pages have no defined content, that is harmless.
//
// QEMU 7.2 punches a hole into the RAM file before it discards (ram_block_discard_range), and for huge pages does not
// discard in a way that makes an event: old content that was in flight may then come back in both modes.
//
// Why that is harmless, also for a guest that relies on zeros: a page in flight has not been touched here since the switch.
// Its content at the source is what the guest left when it freed the page, so zeros if the guest clears what it frees
// (init_on_free=1, after which reported pages are taken for zero). The page only is as if it had not been given up.
// What must never happen is that a page that was here, so that the guest may have written to it, is installed a second time.
//
// The process may be killed at any point of it; the next engine of the same state finds
//
//	the event not read        it is still there, and the process waits in madvise(2); all copies are refused (EAGAIN)
//	                          until it is read and, by the gate, marked
//	read, not or half marked  pages that are missing: they come from the source, see above. A page that was being installed
//	                          has not come: the gate kept the read from coming between copy and mark
//	marked                    they are zero
//	a copy done, not marked   what the kernel answered is kept, and says that the page was there (copies.go)
//	a page that was there     present: its hole, by whichever call, reads as zero. The fault on it is answered by a
//	                          zero page (refill), which is refused as long as an event is not read, and then comes again
//
// # Pages that another process touches
//
// A process that maps the RAM file as well gets pages of zeros where the VM's have not come, and the kernel would let the
// VM find these. See others.go for what keeps it from that.
//
// # When it cannot go on
//
// Whatever fails, missing pages stay registered: threads that need one wait, none reads a zero in its place. The next
// Run begins with waking them all; they fault again, so nothing has to be remembered about who waited.
package postcopy
