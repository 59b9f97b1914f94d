// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A snapshot is the state of the devices at one moment, and the memory that a QEMU reads when it loads that state.
type snapshot struct {
	sections []devicestate.Section
	pages    []*migratedv1.Memory
	size     int                          // bytes that QEMU saved; taken from earlyRoom
	reads    map[int][]*migratedv1.Memory // by index of the section: the pages that loading it reads
}

// close gives the memory back to earlyRoom. It may be called more than once, and on nil.
func (e *snapshot) close() {
	if e != nil {
		earlyRoom.give(e.size)
		*e = snapshot{}
	}
}

// whyNotEarly returns why the device state must not be loaded early, but only after the VM has stopped; nil: it may be
// loaded early.
func (s *Source) whyNotEarly() error {
	switch {
	case s.noEarlyReason != nil:
		return s.noEarlyReason
	case s.cfg.Spec.GetNoEarlyLoad():
		return errors.New("it was switched off")
	case s.cfg.Spec.GetDestinationQmp() != "":
		return errors.New("the destination's QEMU was started by somebody else, and could not be replaced")
	case !s.wasRunning:
		return errors.New("the VM is paused")
	}
	if libvirt.IsAddress(s.cfg.Spec.GetVm()) {
		if err := libvirt.WhyLeases(); err != nil {
			return err
		}
	}
	for _, b := range s.facts.RAMBlocks {
		if b.PageSize > pagesrv.LargestPage {
			return fmt.Errorf("RAM %q has pages of %d MiB", b.ID, b.PageSize>>20)
		}
	}
	return nil
}

// prepareEarly has the destination load the device state as it is now. The destination waits for this call. If an early
// load does not work, everything is loaded after the VM has stopped. When prepareEarly returns nil, the destination is
// prepared either way.
func (s *Source) prepareEarly(ctx context.Context) error {
	shown := &migratedv1.EarlyLoad{}
	var missed []*migratedv1.Memory
	var failed error
	for try := 0; ; try++ {
		var state *snapshot
		// The call begins before the VM stops. If this daemon ends meanwhile, so does the call, and the destination
		// knows.
		answer, err := s.callEarly(ctx, func() *snapshot {
			if failed == nil {
				state, failed = s.takeSnapshot(ctx, missed, shown)
			}
			return state
		})
		if err != nil {
			state.close()
			return causeOf(ctx, fromPeer("load the early state of the devices", s.cfg.Spec.GetDestination(), err))
		}
		if state == nil && (answer.GetLoaded() || len(answer.GetMissed()) > 0) {
			return withReason(fmt.Errorf("load the early state of the devices: destination %s speaks of loading a state that "+
				"it was not sent", s.cfg.Spec.GetDestination()), migratedv1.Reason_REASON_PROTOCOL)
		}
		shown.LoadTime = answer.GetLoadTime()
		if answer.GetLoaded() {
			s.keepEarlyState(state, answer)
			shown.Loaded, shown.Bytes = true, uint64(state.size)
			break
		}
		state.close()
		if failed == nil {
			failed = errors.New(answer.GetReason())
		}
		if len(answer.GetMissed()) == 0 {
			break // it is prepared
		}
		missed = appendMissed(missed, answer.GetMissed())
		if err := s.checkPauseLimit(shown); err != nil {
			failed = fmt.Errorf("%w; %w", failed, err)
		} else if try+1 < earlyTries {
			failed = nil
		}
	}
	if !shown.GetLoaded() {
		shown.Reason = failed.Error()
	}
	s.log.Info("the early state of the devices", "loaded", shown.GetLoaded(), "reason", shown.GetReason(),
		"pause", shown.GetPause().AsDuration(), "load", shown.GetLoadTime().AsDuration(), "bytes", shown.GetBytes())
	s.update(func(m *migratedv1.Migration) { m.EarlyLoad = shown })
	return nil
}

// appendMissed adds to missed the pages of more that it lacks, and no more than can be copied while the VM stands
// still.
func appendMissed(missed, more []*migratedv1.Memory) []*migratedv1.Memory {
	had := make(map[earlyPage]bool, len(missed))
	for _, p := range missed {
		had[earlyPage{int(p.GetBlock()), p.GetOffset()}] = true
	}
	for _, p := range more {
		at := earlyPage{int(p.GetBlock()), p.GetOffset()}
		if !had[at] && len(missed) <= earlyPagesMost/smallPage {
			had[at], missed = true, append(missed, p)
		}
	}
	return missed
}

// keepEarlyState keeps the state that the destination has loaded, and the pages that it has read for that.
func (s *Source) keepEarlyState(state *snapshot, answer *migratedv1.LoadEarlyStateResponse) {
	copied := make(map[earlyPage]*migratedv1.Memory, len(state.pages))
	for _, p := range state.pages {
		copied[earlyPage{int(p.GetBlock()), p.GetOffset()}] = p
	}
	s.earlySavedAt = time.Now()
	state.pages, state.reads = nil, make(map[int][]*migratedv1.Memory, len(answer.GetReaders()))
	for _, r := range answer.GetReaders() {
		var pages []*migratedv1.Memory
		for _, p := range r.GetPages() {
			pages = append(pages, copied[earlyPage{int(p.GetBlock()), p.GetOffset()}])
		}
		state.reads[int(r.GetSection())] = pages
	}
	s.earlyState = state
}

// readPagesChanged reports whether the pages that loading a section has read are different in the stopped VM's memory.
// A section that has not changed need not be loaded again if these pages have not changed either.
func (s *Source) readPagesChanged(section int) bool {
	var now [smallPage]byte
	for _, p := range s.earlyState.reads[section] {
		// A large page counts as changed: to compare it takes longer than to load the section.
		if len(p.GetData()) != len(now) || s.ram.Read(int(p.GetBlock()), p.GetOffset(), now[:]) != nil ||
			!bytes.Equal(now[:], p.GetData()) {
			return true
		}
	}
	return false
}

// checkPauseLimit returns nil if the VM may be paused for another save. It checks only before a save: one that is under
// way cannot be limited, because QEMU answers nobody until it has ended.
func (s *Source) checkPauseLimit(shown *migratedv1.EarlyLoad) error {
	if pause, limit := shown.GetPause().AsDuration(), earlyPauseLimit(s.cfg.Spec); pause > limit {
		return fmt.Errorf("the VM was paused for %v, longer than early_pause_limit (%v)", pause, limit)
	}
	return nil
}

// takeSnapshot saves the device state of the running VM. In the same pause it copies the pages that loading is known to
// read: missed, and those of pagesToRead. If the VM went on before they were copied, it tries again.
func (s *Source) takeSnapshot(
	ctx context.Context, missed []*migratedv1.Memory, shown *migratedv1.EarlyLoad,
) (state *snapshot, err error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	pages, err := s.pagesToRead(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask QEMU for the rings of virtio devices: %w", err)
	}
	seen := map[earlyPage]bool{}
	size := 0
	var wanted []*migratedv1.Memory
	for _, p := range append(pages, missed...) {
		at := earlyPage{int(p.GetBlock()), p.GetOffset()}
		if at.block >= len(s.blocks) || seen[at] {
			continue
		}
		seen[at] = true
		size += int(s.blocks[at.block].PageSize)
		wanted = append(wanted, p)
	}
	if size > earlyPagesMost {
		return nil, fmt.Errorf("loading reads %d MiB of memory, more than are copied while the VM stands still", size>>20)
	}
	const tries = 3
	for try := 1; ; try++ {
		saved, err := s.saveOnce(ctx, wanted, shown)
		if errors.Is(err, qemu.ErrTooShort) && try < tries {
			if err := s.checkPauseLimit(shown); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		return newSnapshot(saved, wanted)
	}
}

// newSnapshot returns the snapshot of what QEMU has saved, with the pages that were copied in the same pause. It takes
// memory from earlyRoom, which close gives back.
func newSnapshot(saved []byte, pages []*migratedv1.Memory) (*snapshot, error) {
	all, err := devicestate.Parse(saved)
	if err != nil {
		return nil, err
	}
	early, err := devicestate.Early(all)
	if err != nil {
		return nil, err
	}
	state := &snapshot{sections: early, pages: pages, size: len(saved)}
	if len(state.sections) == 0 {
		return nil, errors.New("no device is known to take long to load")
	}
	if state.size > earlyStateMost {
		return nil, fmt.Errorf("the devices' state has %d MiB, at most %d are loaded early",
			state.size>>20, earlyStateMost>>20)
	}
	if err := earlyRoom.take(state.size); err != nil {
		return nil, err
	}
	return state, nil
}

// saveOnce has QEMU save once, and copies the pages during the pause.
func (s *Source) saveOnce(
	ctx context.Context, pages []*migratedv1.Memory, shown *migratedv1.EarlyLoad,
) ([]byte, error) {
	for _, p := range pages { // before the pause
		p.Data = make([]byte, s.blocks[p.GetBlock()].PageSize)
	}
	if err := s.readPages(pages); err != nil {
		return nil, err
	}
	before := make([][]byte, len(pages))
	for i, p := range pages {
		before[i] = bytes.Clone(p.GetData())
	}
	saver, err := s.vm.NewSaver(ctx)
	if err != nil {
		return nil, fmt.Errorf("prepare to save the device state: %w", err)
	}
	testPoint("source-early")
	saved, pause, err := saver.SaveRunning(ctx, func() error { return s.readPages(pages) })
	if errors.Is(err, qemu.ErrTooShort) && saved != nil {
		err = s.checkPagesSame(pages, before, err)
	}
	testPoint("source-early-saved")
	shown.Pause = durationpb.New(shown.GetPause().AsDuration() + pause)
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), attachTimeout)
	defer cancel()
	if closeErr := saver.Close(closing); closeErr != nil {
		s.log.Warn("QEMU keeps a descriptor that the device state was saved to", "error", closeErr)
	}
	if err != nil {
		return nil, fmt.Errorf("save the device state of the running VM: %w", err)
	}
	return saved, nil
}

// readPages fills pages with the VM's memory as it is now.
func (s *Source) readPages(pages []*migratedv1.Memory) error {
	for _, p := range pages {
		if err := s.ram.Read(int(p.GetBlock()), p.GetOffset(), p.GetData()); err != nil {
			return err
		}
	}
	return nil
}

// checkPagesSame returns nil if pages are the same as before a pause that was too short to copy them, and tooShort if
// not. They may still have been different in between. That does no harm: an early load is kept only if its section, and
// the pages that loading has read, are the same after the VM has stopped.
func (s *Source) checkPagesSame(pages []*migratedv1.Memory, before [][]byte, tooShort error) error {
	if err := s.readPages(pages); err != nil {
		return err
	}
	for i, p := range pages {
		if !bytes.Equal(p.GetData(), before[i]) {
			return tooShort
		}
	}
	return nil
}

// pagesToRead returns the pages that loading is known to read, without their data: the rings of virtio devices, and the
// option ROMs.
func (s *Source) pagesToRead(ctx context.Context) (pages []*migratedv1.Memory, err error) {
	addresses, err := s.vm.RingPages(ctx)
	if err != nil {
		return nil, err
	}
	for _, b := range s.facts.RAMBlocks {
		for at := uint64(legacyROMs); b.HoldsFirstPage && at < min(legacyROMs+legacyROMBytes, b.Size); at += smallPage {
			addresses = append(addresses, b.Addr+at)
		}
	}
	for _, addr := range addresses {
		for i, b := range s.blocks {
			if offset := addr - b.Addr; offset < b.Size {
				pages = append(pages, &migratedv1.Memory{Block: uint32(i), Offset: offset &^ (b.PageSize - 1)})
			}
		}
	}
	return pages, nil
}

// smallPage is the size of the smallest page on a PC, in bytes.
const smallPage = 4096

// earlyChunk is the most that one message carries, in bytes.
const earlyChunk = 128 << 10

// callEarly opens the call LoadEarlyState, sends the snapshot that take returns, and returns the destination's answer.
// If take returns nil, it sends no state.
func (s *Source) callEarly(ctx context.Context, take func() *snapshot) (*migratedv1.LoadEarlyStateResponse, error) {
	stream, err := s.peer.LoadEarlyState(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&migratedv1.LoadEarlyStateRequest{Id: s.cfg.ID, Head: devicestate.Head(s.facts.MachineType)})
	state := take()
	if state == nil {
		state = &snapshot{}
	}
	for part := range slices.Chunk(devicestate.Join(state.sections), earlyChunk) {
		if err == nil {
			err = stream.Send(&migratedv1.LoadEarlyStateRequest{Sections: part})
		}
	}
	for _, p := range state.pages {
		offset := p.GetOffset()
		for part := range slices.Chunk(p.GetData(), earlyChunk) {
			if err == nil {
				err = stream.Send(&migratedv1.LoadEarlyStateRequest{
					Memory: []*migratedv1.Memory{{Block: p.GetBlock(), Offset: offset, Data: part}},
				})
			}
			offset += uint64(len(part))
		}
	}
	// Send fails if the call is over: CloseAndRecv then has the reason.
	answer, recvErr := stream.CloseAndRecv()
	if recvErr != nil {
		return nil, recvErr
	}
	return answer, err
}

// startOver begins again with a VM whose devices have changed too much since the early load. It continues the VM, has
// the destination prepare a fresh QEMU, and stops the VM again. This time everything is loaded after the stop.
func (s *Source) startOver(ctx context.Context, reason error) bool {
	s.export.Revoke()
	note, err := s.continueVM()
	pause := time.Since(s.stoppedAt)
	s.tellToGiveUp(ctx, reason)
	if err != nil {
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			fmt.Errorf("start over: %w: %w", reason, err), s.whereBeforeCommit(note))
		return false
	}
	s.log.Warn("starting over without an early load", "reason", reason, "pause", pause)
	s.noEarlyReason = reason
	if err := s.prepareAfresh(ctx, pause); err != nil {
		s.backOut(ctx, err)
		return false
	}
	return s.switchOver(ctx)
}
