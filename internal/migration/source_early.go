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
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A snapshot is the state of devices at a moment, and the memory that loading it reads.
type snapshot struct {
	sections []devicestate.Section
	pages    []*migratedv1.Memory
	size     int                          // bytes of what QEMU saved, taken of earlyRoom
	reads    map[int][]*migratedv1.Memory // of the sections: what loading them reads
}

// close gives back what it has of the process' memory, once.
func (e *snapshot) close() {
	if e != nil {
		earlyRoom.give(e.size)
		*e = snapshot{}
	}
}

// whyNotEarly says why the devices' state is loaded only when the VM has stopped; nil: it may be loaded before.
func (s *Source) whyNotEarly() error {
	switch {
	case s.notEarly != nil:
		return s.notEarly
	case s.cfg.Spec.GetNoEarlyLoad():
		return errors.New("it was switched off")
	case s.cfg.Spec.GetDestinationQmp() != "":
		return errors.New("the destination's QEMU was started by somebody else, and could not be replaced")
	case !s.wasRunning:
		return errors.New("the VM is paused")
	}
	for _, b := range s.facts.RAMBlocks {
		if b.PageSize > pagesrv.LargestPage {
			return fmt.Errorf("RAM %q has pages of %d MiB", b.ID, b.PageSize>>20)
		}
	}
	return nil
}

// prepareEarly has a destination that waits for it load the devices' state as it is now. Where that does not work, all
// is loaded when the VM has stopped. When it returns nil, the destination is prepared.
func (s *Source) prepareEarly(ctx context.Context) error {
	shown := &migratedv1.EarlyLoad{}
	var missed []*migratedv1.Memory
	var failed error
	for try := 0; ; try++ {
		var state *snapshot
		// The call is begun before the VM stops: its end tells the destination that this daemon has ended.
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
		shown.LoadTime = answer.GetLoadTime()
		if answer.GetLoaded() {
			s.useEarly(state, answer)
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
		missed = append(missed, answer.GetMissed()...)
		if err := s.mayPauseAgain(shown); err != nil {
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

// useEarly keeps what the destination has loaded, and what it has read for that.
func (s *Source) useEarly(state *snapshot, answer *migratedv1.LoadEarlyStateResponse) {
	copied := make(map[earlyPage]*migratedv1.Memory, len(state.pages))
	for _, p := range state.pages {
		copied[earlyPage{int(p.GetBlock()), p.GetOffset()}] = p
	}
	s.earlyAt = time.Now()
	state.pages, state.reads = nil, make(map[int][]*migratedv1.Memory, len(answer.GetReaders()))
	for _, r := range answer.GetReaders() {
		var pages []*migratedv1.Memory
		for _, p := range r.GetPages() {
			pages = append(pages, copied[earlyPage{int(p.GetBlock()), p.GetOffset()}])
		}
		state.reads[int(r.GetSection())] = pages
	}
	s.early = state
}

// readsOther says whether loading a section of the early state reads something else in the stopped VM's memory than it
// did. What has not changed, and reads what it read, need not be loaded again.
func (s *Source) readsOther(section int) bool {
	var now [smallPage]byte
	for _, p := range s.early.reads[section] {
		// A large page is not compared: that takes longer than loading.
		if len(p.GetData()) != len(now) || s.ram.Read(int(p.GetBlock()), p.GetOffset(), now[:]) != nil ||
			!bytes.Equal(now[:], p.GetData()) {
			return true
		}
	}
	return false
}

// mayPauseAgain is nil if the VM has not stood still for too long already. A save under way cannot be bounded: QEMU
// answers nobody until it has ended.
func (s *Source) mayPauseAgain(shown *migratedv1.EarlyLoad) error {
	if pause, limit := shown.GetPause().AsDuration(), earlyPauseLimit(s.cfg.Spec); pause > limit {
		return fmt.Errorf("the VM has stood still for %v for it, and may for %v", pause, limit)
	}
	return nil
}

// takeSnapshot saves the devices' state of the running VM, and copies in the same pause what loading is known to read:
// missed, and the rings of virtio devices. A VM that went on too soon is tried again.
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
		saved, err := s.saveBriefly(ctx, wanted, shown)
		if errors.Is(err, qemu.ErrTooShort) && try < tries {
			if err := s.mayPauseAgain(shown); err != nil {
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

func newSnapshot(saved []byte, pages []*migratedv1.Memory) (*snapshot, error) {
	all, err := devicestate.Parse(saved)
	if err != nil {
		return nil, err
	}
	state := &snapshot{sections: devicestate.Early(all), pages: pages, size: len(saved)}
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

// saveBriefly has QEMU save once, and fills the pages meanwhile.
func (s *Source) saveBriefly(
	ctx context.Context, pages []*migratedv1.Memory, shown *migratedv1.EarlyLoad,
) ([]byte, error) {
	for _, p := range pages { // not in the pause
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
	reached("source-early")
	saved, pause, err := saver.SaveRunning(ctx, func() error { return s.readPages(pages) })
	if errors.Is(err, qemu.ErrTooShort) && saved != nil {
		err = s.sameStill(pages, before, err)
	}
	reached("source-early-saved")
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

// readPages fills pages with what the VM has there now.
func (s *Source) readPages(pages []*migratedv1.Memory) error {
	for _, p := range pages {
		if err := s.ram.Read(int(p.GetBlock()), p.GetOffset(), p.GetData()); err != nil {
			return err
		}
	}
	return nil
}

// sameStill is nil if pages have what they had before a pause that was too short to look, and tooShort if not. Were it
// another in between, no harm is done: what is loaded early is kept only if its section, and what it has read, are the
// same when the VM has stopped.
func (s *Source) sameStill(pages []*migratedv1.Memory, before [][]byte, tooShort error) error {
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

// pagesToRead are the pages that loading is known to read, without data: the rings of virtio devices, and the option
// ROMs.
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

// smallPage is the smallest that a PC has.
const smallPage = 4096

// earlyChunk is how much one message carries.
const earlyChunk = 128 << 10

// callEarly sends what take returns, nil: nothing, and returns what the destination says of it.
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
	// An error of Send is that the call is over: CloseAndRecv has its reason.
	answer, recvErr := stream.CloseAndRecv()
	if recvErr != nil {
		return nil, recvErr
	}
	return answer, err
}

// startOver moves a VM after all whose devices have changed too much since the early load: it goes on, a fresh QEMU is
// prepared at the destination, and loads everything when the VM has stopped again.
func (s *Source) startOver(ctx context.Context, reason error) bool {
	s.export.Withdraw()
	note, err := s.continueVM()
	pause := time.Since(s.stoppedAt)
	s.tellToGiveUp(ctx, reason)
	if err != nil {
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, fmt.Errorf("start over: %w: %w", reason, err), s.whereNow(note))
		return false
	}
	s.log.Warn("starting over without an early load", "reason", reason, "pause", pause)
	s.notEarly = reason
	if err := s.prepareAfresh(ctx, pause); err != nil {
		s.backOut(ctx, err)
		return false
	}
	return s.switchOver(ctx)
}
