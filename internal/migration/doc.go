// SPDX-License-Identifier: Apache-2.0

// Package migration is the switch: the two state machines, one on each host,
// that move a running VM from the source's QEMU to the destination's and never
// let both run it.
//
//	source host                                    destination host
//	===========                                    ================
//	SETUP                                          SETUP
//	  check the VM, open its memory                  start QEMU -S -incoming defer, or attach
//	  offer the memory (not served yet)              have QEMU drop what it put into its memory
//	        ── PrepareIncoming ──────────────►       take a userfaultfd
//	        ◄─ early ─────────────────────────
//	  have QEMU save the devices' state as it is now:
//	    it stops the VM and continues it by itself
//	  copy the memory that loading reads meanwhile
//	        ── LoadEarlyState ────────────────►      migrate-incoming; QEMU loads it, reads that memory and no
//	                                                 other, and waits for the rest of the stream
//	                                                 drop all of its memory again
//	                                                 register all memory
//	        ◄─ page lanes (Fetch) ────────────       open the lanes, start the fault workers
//	        ◄─ loaded; prepared ──────────────
//	  prepared: waits for Start                      prepared: waits for the device state
//	                                                 (kept: facts, page states)
//	  renew: all of that once more, where the early
//	  state is old or the VM has other devices
//	DEVICE                                         DEVICE
//	        ── LoadDeviceState ───────────────►      QEMU answers
//	        ◄─ it reads ──────────────────────
//	  warm the connection up
//	  write the record, not committed yet
//	  add what can keep QEMU from continuing the VM
//	  stop; the memory is served now
//	  save the devices' state, give the disks up;
//	  ───────── commit point ───────── meanwhile
//	  lock it: QEMU refuses cont; commit the record
//	  (rename, fsync)
//	  QEMU says that the VM still stands
//	        ── what has changed, and Run ─────►      QEMU loads it
//	                                                 mark 'told to run', announce the network cards,
//	        ◄─ running ───────────────────────       cont (takes the disks, sends the announcements)
//	POSTCOPY_ACTIVE                                POSTCOPY_ACTIVE
//	  page server answers faults and sweep           fault workers and sweep fill the RAM
//	        ◄─ WatchIncoming: figures ────────       lanes lost: POSTCOPY_PAUSED, dial again,
//	                                                 POSTCOPY_RECOVER, POSTCOPY_ACTIVE
//	COMPLETED                                      COMPLETED
//	  quit QEMU, remove the record                   unregister, close QEMU's descriptor,
//	                                                 remove what was kept
//	or ENDED, where the VM ended by itself         ENDED, where QEMU said SHUTDOWN and its process has ended
//	  quit QEMU, remove the record                   remove what was kept
//
// Where a device's state has another form when the VM has stopped than it had early, and cannot be loaded over that,
// the source continues the VM, tells the destination to give up, and goes through all of it again, without an early
// load (startOver).
//
// Without an early load (it is switched off, the VM is paused, loading read what was not copied four times) all of the
// state is loaded when the VM has stopped, which may fail, and so the source commits only when it knows that it did
// not:
//
//	DEVICE                                         DEVICE
//	        ── LoadDeviceState: the head ─────►      migrate-incoming; QEMU reads the head and waits
//	        ◄─ it reads ──────────────────────       for the first device
//	  warm the connection up
//	  write the record, not committed yet
//	  stop; the memory is served now
//	  save the devices' state
//	        ── what there is of it ───────────►      QEMU loads, and waits for pages that it touches
//	  give the disks up
//	        ── its end ───────────────────────►
//	        ◄─ loaded ────────────────────────       loaded: waits for Run
//	  QEMU says that the VM still stands, and before each Run again
//	  ───────── commit point ─────────
//	  commit the record (rename, fsync)
//	        ── Run, until answered ───────────►      mark 'told to run', announce the network cards,
//	        ◄─ running ───────────────────────       cont (takes the disks, sends the announcements)
//
// While Run, or what stands for it, is not answered, the source is in HANDOVER: nobody there knows where the VM is.
//
// A rehearsal goes on where it has loaded: the destination saves what it has loaded and compares, the source
// continues the VM (which has not given its disks up) and tells the destination to give up. It is REHEARSED.
//
// A VM that was paused stays paused: nothing runs it, at either end. Its disks are taken when it is loaded, because
// it may be moved on without ever having run, and given up only by a QEMU that has them.
//
// No wait between stop and running depends on a lock that a QEMU holds while it waits for us: see moveDevices.
//
// Who may run the VM, and what a failure does:
//
//   - Before the commit point the VM belongs to the source. Whatever fails, on
//     either side or between them, and a cancellation too, the source continues
//     the VM (if it ran) and tells the destination to give up. Where its connection to QEMU was lost, as libvirt's are
//     with its daemon, it waits for another one to do so (awaitMonitor). The destination
//     runs it only when told by Run, which was never sent, so that the source
//     need not wait for an answer before it continues. A freeze is such a failure when it has lasted for freezeLimit.
//   - From the commit point on the source does not continue the VM by itself,
//     but where what has changed could not be sent, so that the destination was
//     not told to run. Else it repeats Run until the destination answers. One answer gives the VM
//     back: ABORTED, the destination's promise that it has not run the VM and
//     never will (its QEMU could not load what has changed, or died, say). No answer, or any other,
//     leaves the VM stopped at the source with its memory intact.
//   - From the commit point on the source's QEMU refuses to continue the VM, whoever asks (qemu.ContLock), also when no
//     daemon lives. Who has the VM go on at the source removes that lock first.
//   - Somebody else may continue the VM at the source before, or where QEMU cannot have that lock (QEMU's event
//     RESUME, and its answer when it is asked): then the destination has an older one, and is never told to run it,
//     or told again. If it may have been told, it is asked to give up until it answers (takeBack): its answer alone
//     says whether the VM runs twice. The VM is left as it is.
//   - After an early load the commit point comes before the destination has
//     loaded what has changed. A network that is cut in these milliseconds
//     leaves the VM stopped until it is mended, as one that is cut a moment
//     later always did. That is all that is given up: it never runs twice.
//   - The destination may give up by itself until Run arrives, and then
//     answers Run with ABORTED for as long as it lives. Where it gives up because its
//     daemon is stopped, the files stay and the next daemon answers so. Once it has asked its
//     QEMU to continue, the VM belongs to the destination, whatever QEMU
//     answers: while nobody knows whether it heard, Run is answered with
//     UNKNOWN and comes again.
//   - Memory that is the source QEMU's alone ends with it. If that dies after the switch, what has not crossed is lost:
//     what needs it waits at the destination, and nothing else can be done but to end the VM there. Both hosts say so,
//     and neither ends it: the VM may not need what is lost, and what is in files of the source's still comes. Of a VM
//     whose RAM is such a file, all that is not is brought first.
//   - Words about where the VM is come from its process and its QEMU, when they are said, or from the other daemon; else
//     they say that it is not known (where.go). A QEMU that closes its monitor has not ended.
//   - A VM that ended by itself after it ran at the destination is no VM to be continued: its memory at the source is older
//     than its disks. A QEMU that died is another thing: its operator may fall back.
//   - Three commands of operators end what neither daemon can: FallBack continues the VM at the source (the destination is
//     gone), Release ends what is left there (the VM is at the destination, whole), Abandon ends the VM at the destination
//     (the source is gone). Each needs the operator's word for what the daemon cannot know, and is refused where it knows
//     better.
//   - After the switch a page that cannot be fetched stalls the vCPU that needs
//     it. It is never read as zero: the destination's QEMU keeps its copy of the
//     userfaultfd open until the last page is in. So the destination gives up
//     nothing that can come right again: a lost lane, a host without memory, a
//     source that breaks the protocol.
//
// A daemon that is stopped after the commit point leaves the migration as it is, on either host: that is no failure.
// A daemon that ended in the middle, in whatever way, and is started again takes
// up what it left (TakeUpSource, TakeUpDestination):
//
//	what the files say                  what it does
//	source: record, not committed       continues the VM (if it ran), removes the record
//	source: record, committed           serves its pages again and repeats Run
//	  somebody continued the VM         serves nothing, asks the destination to give up, removes the record
//	source: record, completed           ends QEMU, removes the record; COMPLETED, or ENDED if it says so
//	source: a damaged record            names it (Leftover); VMs that stand still are not moved while it is there
//	destination: not loaded             ends QEMU; the source has continued the VM, or does so when Run was answered
//	                                    with ABORTED
//	destination: loaded                 goes on waiting for Run; if its QEMU is gone (a stopped daemon
//	                                    gives up), answers it with ABORTED
//	destination: told to run            fetches what is missing; tells QEMU again if Run comes
//	                                    again and nobody knows whether QEMU heard it
//	destination: all memory is here     closes QEMU's descriptor, if that was not done, and is COMPLETED
//	                                    (files that say so stay for wordKept: the source may not know yet)
//	destination: the VM ended           is ENDED, for as long
//
// Where somebody else has QEMU's monitor by then, which serves one client, both wait for it: a source whose VM stands
// still continues it then, and a destination puts QEMU's settings back, also when its migration is over (putBackLater).
//
// Everything that a decision needs is in the files: QEMU is not asked, because
// its main loop may be what waits for a page.
package migration
