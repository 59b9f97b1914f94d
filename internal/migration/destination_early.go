// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// earlyLoaded is what a destination's QEMU has loaded before the VM stops. It waits for the rest of the stream.
type earlyLoaded struct {
	carrier  *deviceCarrier
	loading  *qemu.Loading
	sections []devicestate.Section
	touched  []earlyPage // memory that loading them read
	size     int         // of earlyRoom
}

// close lets go of what was kept, once. QEMU has what it has loaded.
func (e *earlyLoaded) close() {
	if e != nil {
		e.carrier.close()
		earlyRoom.give(e.size)
		e.sections, e.touched, e.size = nil, nil, 0
	}
}

// earlyStream is the call that brings an early state.
type earlyStream = grpc.ClientStreamingServer[migratedv1.LoadEarlyStateRequest, migratedv1.LoadEarlyStateResponse]

// expectEarly waits for the source to begin LoadEarlyState. While that call lasts, its end says that the source has
// ended.
func (d *Destination) expectEarly() {
	d.phase = awaitingEarly
	d.expire(awaitingEarly, awaitingEarlyTimeout, "the early state of the devices did not come")
}

// LoadEarlyState has QEMU load the state that the devices had a moment ago. Unless it is wanted once more, the
// destination is prepared then, with it or without. When it fails the destination has given up.
func (d *Destination) LoadEarlyState(first *migratedv1.LoadEarlyStateRequest, stream earlyStream) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.expect(awaitingEarly); err != nil {
		return err
	}
	d.steps++
	limit := earlyTimeout + timeToPrepare(d.cfg.Request.GetMachine()) // of another QEMU
	late := fmt.Errorf("the early state was not loaded within %v", limit)
	ctx, expire := context.WithTimeoutCause(d.loadCtx, limit, late)
	defer expire()
	stop := context.AfterFunc(stream.Context(), expire)
	defer stop()
	answer, err := d.loadEarlyState(ctx, first, stream)
	if err != nil {
		err = causeOf(ctx, err)
		d.giveUp(err)
		return err
	}
	if d.phase == awaitingEarly {
		d.expectEarly()
	}
	return stream.SendAndClose(answer)
}

func (d *Destination) loadEarlyState(
	ctx context.Context, first *migratedv1.LoadEarlyStateRequest, stream earlyStream,
) (*migratedv1.LoadEarlyStateResponse, error) {
	answer := &migratedv1.LoadEarlyStateResponse{}
	state, err := awaitEarly(ctx, first, stream, d.blocks)
	if err != nil {
		return nil, fmt.Errorf("receive the early state of the devices: %w", err)
	}
	if len(state.sections) == 0 { // the source has none for us
		return answer, d.ready(ctx)
	}
	began := time.Now()
	reached("destination-early")
	memory, err := d.tryEarly(ctx, state)
	reached("destination-early-loaded")
	answer.LoadTime = durationpb.New(time.Since(began))
	if memory != nil {
		answer.Missed, answer.Readers = memory.shownMissed(), memory.shownReaders()
	}
	switch {
	case err == nil && len(answer.Missed) == 0:
		answer.Loaded = true
	case err == nil:
		p := memory.missed[0]
		answer.Reason = fmt.Sprintf("loading it reads %d pages of the VM's memory that did not come with it, "+
			"first that at %#x of %q", len(answer.Missed), p.offset, d.blocks[p.block].ID)
	default:
		answer.Reason = d.explain(err).Error()
	}
	d.log.Info("loaded the early state of the devices", "loaded", answer.Loaded, "reason", answer.Reason,
		"sections", len(state.sections), "pages", len(state.pages), "readers", len(answer.Readers), "time", time.Since(began))
	if answer.Loaded {
		return answer, d.ready(ctx)
	}
	if err := d.replaceQEMU(ctx); err != nil {
		return nil, fmt.Errorf("start another QEMU, as the early state of the devices was not loaded (%s): %w",
			answer.Reason, err)
	}
	if len(answer.Missed) > 0 {
		return answer, nil
	}
	return answer, d.ready(ctx)
}

// An earlyState is what came of a source.
type earlyState struct {
	head     []byte
	sections []devicestate.Section
	pages    map[earlyPage][]byte
	size     int // of the sections
}

// awaitEarly receives until ctx ends, which is also when somebody waits for the lock to give up. The stream ends when
// its call returns, and with it the goroutine.
func awaitEarly(
	ctx context.Context, first *migratedv1.LoadEarlyStateRequest, stream earlyStream, blocks []qemu.RAMBlock,
) (state *earlyState, err error) {
	received := make(chan struct{})
	var came *earlyState
	var cameErr error
	go func() {
		defer close(received)
		came, cameErr = receiveEarly(first, stream, blocks)
	}()
	select {
	case <-received:
		return came, cameErr
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// receiveEarly takes all messages of a source, which may send what it likes.
func receiveEarly(
	first *migratedv1.LoadEarlyStateRequest, stream earlyStream, blocks []qemu.RAMBlock,
) (*earlyState, error) {
	state := &earlyState{head: first.GetHead(), pages: map[earlyPage][]byte{}}
	var sections []byte
	memory := 0
	for message := first; ; {
		sections = append(sections, message.GetSections()...)
		for _, piece := range message.GetMemory() {
			if err := state.addMemory(piece, blocks); err != nil {
				return nil, err
			}
			memory += len(piece.GetData())
		}
		if len(sections) > earlyStateMost || memory > earlyPagesMost {
			return nil, fmt.Errorf("more than %d bytes of devices' state or %d of memory", earlyStateMost, earlyPagesMost)
		}
		var err error
		if message, err = stream.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
	}
	for page, content := range state.pages {
		if uint64(len(content)) != blocks[page.block].PageSize {
			return nil, fmt.Errorf("RAM block %q: half a page at %#x", blocks[page.block].ID, page.offset)
		}
	}
	var err error
	state.size = len(sections)
	if len(sections) > 0 {
		state.sections, err = devicestate.Split(sections)
	}
	return state, err
}

// addMemory adds the next part of a page.
func (e *earlyState) addMemory(piece *migratedv1.Memory, blocks []qemu.RAMBlock) error {
	if int(piece.GetBlock()) >= len(blocks) {
		return fmt.Errorf("memory of RAM block %d of %d", piece.GetBlock(), len(blocks))
	}
	b := blocks[piece.GetBlock()]
	page := earlyPage{int(piece.GetBlock()), piece.GetOffset() &^ (b.PageSize - 1)}
	content := e.pages[page]
	at, size := piece.GetOffset()-page.offset, uint64(len(piece.GetData()))
	if piece.GetOffset() >= b.Size || at != uint64(len(content)) || size == 0 || size > b.PageSize-at {
		return fmt.Errorf("RAM block %q: %d bytes at %#x are not the next part of a page", b.ID, size, piece.GetOffset())
	}
	e.pages[page] = append(content, piece.GetData()...)
	return nil
}

// tryEarly has QEMU load that. The memory that it was given for it is gone when it returns; what is known of it is
// returned, also with an error, unless there is none. When all went well, and nothing was missed, d.early is what QEMU
// has loaded.
func (d *Destination) tryEarly(ctx context.Context, state *earlyState) (memory *earlyMemory, err error) {
	if err := earlyRoom.take(state.size); err != nil {
		return nil, err
	}
	loaded := &earlyLoaded{sections: state.sections, size: state.size}
	if loaded.carrier, err = newDeviceCarrier(); err != nil {
		earlyRoom.give(state.size)
		return nil, err
	}
	defer func() {
		if err != nil || len(memory.missed) > 0 {
			loaded.close()
		} else {
			d.early = loaded
		}
	}()
	if memory, err = newEarlyMemory(ctx, d.vm, d.blocks, state.pages); err != nil {
		return nil, err
	}
	loaded.loading, err = feedEarly(ctx, d.vm, loaded.carrier, state, memory)
	closeErr := memory.close(ctx)
	if err != nil {
		return memory, err // perhaps QEMU has ended, and nothing can be closed in it
	}
	if closeErr != nil {
		return memory, fmt.Errorf("memory of the early load: %w", closeErr)
	}
	loaded.touched = memory.touched()
	if len(memory.missed) > 0 {
		return memory, nil
	}
	if err := d.vm.DropRAM(ctx, d.blocks); err != nil {
		return memory, fmt.Errorf("drop what loading has read: %w", err)
	}
	return memory, nil
}

// feedEarly has QEMU load the early state, section by section: so it is known which of them reads memory.
func feedEarly(
	ctx context.Context, vm *qemu.VM, carrier *deviceCarrier, state *earlyState, memory *earlyMemory,
) (*qemu.Loading, error) {
	loading, err := vm.BeginLoading(ctx, carrier.qemu)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, earlyTimeout)
	defer cancel()
	head := slices.Concat(state.head, devicestate.ReturnPath)
	return loading, loading.Feed(ctx, carrier.ours, head, state.sections, func(int) error { return memory.next(ctx, vm) })
}

// replaceQEMU ends the destination's QEMU, which may have loaded what is not to be used, and prepares another.
func (d *Destination) replaceQEMU(ctx context.Context) error {
	d.endQEMU()
	claimed.give(d.claim)
	err := errors.Join(d.taken.UFFD.Close(), d.vm.Close(), d.reserve.release())
	if err != nil {
		d.log.Warn("let go of a destination QEMU that was ended", "error", err)
	}
	d.taken, d.vm, d.process, d.reserve, d.blocks, d.claim = nil, nil, nil, nil, nil, qemu.Identity{}
	return d.prepareQEMU(ctx)
}
