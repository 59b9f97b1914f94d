// SPDX-License-Identifier: Apache-2.0

// Package migration moves a running VM from the QEMU of one host, the source, to the QEMU of another, the destination.
// Each host runs a state machine, and the two together never let both QEMUs run the VM.
//
//	source host                                    destination host
//	===========                                    ================
//	SETUP
//	        ── AwaitTurn ────────────────────►     (its daemon) keep room, when there is some
//	        ◄─ granted ───────────────────────
//	  wait for a turn at this host                   SETUP
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
//	  quit QEMU, keep the report,                    unregister, close QEMU's descriptor,
//	  remove the record                              remove what was kept
//	or ENDED, where the VM ended by itself         ENDED, where QEMU said SHUTDOWN and its process has ended
//	  quit QEMU, keep the report,                    remove what was kept
//	  remove the record
//
// A device's state can have another form after the stop than it had early. Where it cannot be loaded over the early
// state, the source continues the VM, tells the destination to give up, and does all of the above again without an
// early load (startOver).
//
// Some migrations have no early load: it is switched off, the VM is paused, or loading read memory that had not been
// copied in four attempts. Then all of the state is loaded after the VM has stopped. Loading may fail, so the source
// commits only after the destination has reported that it loaded everything:
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
// A source whose Run (a call of its own, or sent with the last of the device state) is not answered is in HANDOVER
// until it is: nobody at the source knows where the VM is.
//
// A rehearsal ends when the destination has loaded the state. The destination saves what it has loaded and compares.
// The source continues the VM, which has not given its disks up, and tells the destination to give up. The migration
// is then REHEARSED.
//
// A VM that was paused stays paused: neither end runs it. The destination takes its disks when it has loaded the VM,
// because the VM may be moved on without ever having run, and only a QEMU that has the disks can give them up.
//
// Between stop and running, no wait depends on a lock that a QEMU holds while it waits for a daemon: see moveDevices.
//
// Who may run the VM, and what a failure does:
//
//   - Before the commit point the VM belongs to the source. On any failure, on either side or between them, and on a
//     cancellation, the source continues the VM (if it ran) and tells the destination to give up. The destination runs
//     the VM only when Run tells it to, and Run was not sent yet, so the source continues the VM without waiting for
//     an answer. If the source lost its connection to QEMU (libvirt's connections end with libvirt's daemon), it first
//     waits for a new one (awaitMonitor). If QEMU hangs, or refuses to continue the VM, the source tries again until
//     QEMU or this daemon ends (continueVM): a stop that QEMU has not answered may still be pending. A VM that stands
//     still for longer than freezeLimit counts as a failure.
//   - A VM that stopped by itself while it was being stopped (its guest powered off or panicked, a disk failed) is
//     neither handed over nor continued: it would stand still without a migration, too.
//   - After the commit point the source does not continue the VM by itself, with one exception: the changed state could
//     not be sent, so the destination was not told to run the VM. Otherwise the source repeats Run until the
//     destination answers. Only the answer ABORTED gives the VM back. It is the destination's promise that it has not
//     run the VM and never will, for example because its QEMU died or could not load the changed state. With any other
//     answer, or none, the VM stays stopped at the source with its memory intact.
//   - After the commit point the source's QEMU refuses to continue the VM for anybody (qemu.ContLock), also while no
//     daemon runs. Whoever continues the VM at the source has to remove that lock first.
//   - Somebody else may continue the VM at the source before the commit point, or after it where QEMU cannot have that
//     lock. The source learns of it by QEMU's event RESUME and by asking QEMU. The destination then has an older VM,
//     and is not told to run it, or not told again. If it may have been told already, the source asks it to give up
//     until it answers (retractHandOver): only that answer says whether the VM runs twice. The source leaves the VM as
//     it is.
//   - After an early load the source commits before the destination has loaded the changed state. If the network is cut
//     in these milliseconds, the VM stays stopped until the network is mended. The same happens in any migration when
//     the network is cut a moment later. That is the only cost of an early load: the VM never runs twice.
//   - The destination may give up by itself until Run arrives. After it has given up it answers Run with ABORTED for as
//     long as its daemon lives. If it gives up because its daemon is stopped, its files stay and the next daemon gives
//     that answer. Once the destination has asked its QEMU to continue, the VM belongs to the destination, whatever
//     QEMU answers. While it is not known whether QEMU got the command, the destination answers Run with UNKNOWN and
//     the source sends Run again.
//   - Private memory of the source's QEMU ends with that process. If the process dies after the switch, the private
//     pages that have not crossed are lost. Threads that need them wait at the destination for ever; the only remedy is
//     to end the VM there. Both hosts report it, and neither ends the VM: it may not need the lost pages, and pages in
//     files of the source are still served. Of a VM with RAM in such files, all other memory is fetched first.
//   - What a daemon says about where the VM is comes from the VM's process and its QEMU, asked at that moment, or from
//     the other daemon. Otherwise it says that the location is not known (where.go). A QEMU that closes its monitor has
//     not necessarily ended.
//   - A VM that ended by itself after it ran at the destination is not continued at the source: the source's memory is
//     older than the disks. A VM whose QEMU died is different: its operator may fall back to the source.
//   - Three commands let an operator end what neither daemon can end. FallBack continues the VM at the source (the
//     destination is gone). Release ends what is left at the source (all of the VM is at the destination). Abandon ends
//     the VM at the destination (the source is gone). Each needs the operator's word for what the daemon cannot know,
//     and is refused where the daemon knows that it is not so.
//   - After the switch a page that cannot be fetched stalls the vCPU that needs it. The page is never read as zero: the
//     destination's QEMU keeps its copy of the userfaultfd open until the last page is in. So the destination does not
//     give up for a fault that can be mended: a lost lane, a host without memory, a source that breaks the protocol.
//
// A daemon that is stopped after the commit point, on either host, leaves the migration as it is. That is no failure.
// A daemon that is started again goes on with the migrations that the daemon before it left, however that one ended
// (TakeUpSource, TakeUpDestination):
//
//	what the files say                  what it does
//	source: record, not committed       continues the VM (if it ran), removes the record
//	source: record, committed           serves its pages again and repeats Run
//	  somebody continued the VM         serves nothing, asks the destination to give up, removes the record
//	source: record, completed           ends QEMU; COMPLETED, or ENDED if it says so; keeps the report, removes
//	                                    the record
//	source: a damaged record            names it (Leftover); VMs that stand still are not moved while it is there
//	destination: not loaded             ends QEMU; the source has continued the VM, or does so when Run was answered
//	                                    with ABORTED
//	destination: loaded                 goes on waiting for Run; if its QEMU is gone (a stopped daemon
//	                                    gives up), answers it with ABORTED
//	destination: told to run            fetches what is missing; tells QEMU again if Run comes
//	                                    again and nobody knows whether QEMU heard it
//	destination: all memory is here     has libvirt define the domain, if the source asked for that, and closes QEMU's
//	                                    descriptor, both if that was not done, and is COMPLETED
//	                                    (files that say so stay for retentionTime: the source may not know yet)
//	destination: the VM ended           is ENDED, for as long
//
// QEMU's monitor serves one client. If somebody else is connected to it by then, both daemons wait for it. When it is
// free, a source whose VM stands still continues the VM, and a destination restores QEMU's settings, also when its
// migration is over (putBackLater).
//
// Everything that a decision needs is in the files. QEMU is not asked, because its main loop may itself be waiting for
// a page.
package migration
