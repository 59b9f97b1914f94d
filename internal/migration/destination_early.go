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
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// earlyLoaded is the device state that the destination's QEMU has loaded while the VM still runs. QEMU waits for the
// rest of the stream.
type earlyLoaded struct {
	carrier  *deviceCarrier
	loading  *qemu.Loading
	sections []devicestate.Section
	touched  []earlyPage // memory that QEMU read while it loaded them
	size     int         // bytes taken from earlyRoom
}

// close releases what was kept, once. QEMU does not need it any more.
func (e *earlyLoaded) close() {
	if e != nil {
		e.carrier.close()
		earlyRoom.give(e.size)
		e.sections, e.touched, e.size = nil, nil, 0
	}
}

// earlyStream is the server side of the call LoadEarlyState.
type earlyStream = grpc.ClientStreamingServer[migratedv1.LoadEarlyStateRequest, migratedv1.LoadEarlyStateResponse]

// expectEarly waits for the source to call LoadEarlyState. During that call, its context tells when the source has
// ended; before it, the timeout does.
func (d *Destination) expectEarly() {
	d.moveTo(awaitingEarly)
	d.expire(awaitingEarlyTimeout, "the source did not send the early device state")
}

// LoadEarlyState has QEMU load the state that the devices had a moment ago. Then the destination is prepared, whether
// QEMU loaded that state or not. Only if loading read memory that did not come along, the destination waits for
// another LoadEarlyState. On failure the destination has given up.
func (d *Destination) LoadEarlyState(first *migratedv1.LoadEarlyStateRequest, stream earlyStream) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.enter(awaitingEarly, loadingEarly); err != nil {
		return err
	}
	limit := earlyTimeout + timeToPrepare(d.cfg.Request.GetMachine()) // time for a new QEMU
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
	if d.step() == loadingEarly {
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
	if len(state.sections) == 0 { // the source has no early state
		return answer, d.ready(ctx)
	}
	began := time.Now()
	testPoint("destination-early")
	memory, err := d.tryEarly(ctx, state)
	testPoint("destination-early-loaded")
	answer.LoadTime = durationpb.New(time.Since(began))
	if memory != nil {
		answer.Missed, answer.Readers = memory.shownMissed(), memory.shownReaders()
	}
	switch {
	case err == nil && len(answer.Missed) == 0:
		answer.Loaded = true
	case err == nil:
		p := memory.missed[0]
		answer.Reason = fmt.Sprintf("loading it reads %d pages of the VM's memory that were not sent with it; "+
			"the first is at %#x of %q", len(answer.Missed), p.offset, d.blocks[p.block].ID)
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

// An earlyState is what the source sent with LoadEarlyState.
type earlyState struct {
	head     []byte
	sections []devicestate.Section
	pages    map[earlyPage][]byte
	size     int // bytes of the sections
}

// awaitEarly receives the early state until ctx ends. ctx also ends when Abort waits for the lock. The stream ends
// when its call returns, and the goroutine with it.
func awaitEarly(
	ctx context.Context, first *migratedv1.LoadEarlyStateRequest, stream earlyStream, blocks []ram.Block,
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

// receiveEarly receives all messages of the source. It checks them: the source may send anything.
func receiveEarly(
	first *migratedv1.LoadEarlyStateRequest, stream earlyStream, blocks []ram.Block,
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

// addMemory adds the next part of a page and checks that it is one.
func (e *earlyState) addMemory(piece *migratedv1.Memory, blocks []ram.Block) error {
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

// tryEarly has QEMU load the early state. It drops the memory that QEMU was given for that before it returns. The
// returned memory says which pages were read; it is nil only if it could not be made. If QEMU loaded the state and
// read no missing page, d.early is set.
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
		return memory, err // QEMU may have ended; then nothing can be closed in it
	}
	if closeErr != nil {
		return memory, fmt.Errorf("memory of the early load: %w", closeErr)
	}
	loaded.touched = memory.touched()
	if len(memory.missed) > 0 {
		return memory, nil
	}
	if err := d.vm.RAM.Drop(ctx, d.blocks); err != nil {
		return memory, fmt.Errorf("drop what loading has read: %w", err)
	}
	return memory, nil
}

// feedEarly has QEMU load the early state section by section, so that it is known which section reads memory.
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
	fed := func(int) error { return memory.sectionLoaded(ctx, vm) }
	return loading, loading.Feed(ctx, carrier.ours, head, state.sections, fed)
}

// replaceQEMU ends the destination's QEMU, which may have loaded state that must not be used, and prepares a new one.
func (d *Destination) replaceQEMU(ctx context.Context) error {
	d.endQEMU()
	qemuClaims.unclaim(d.claim)
	err := errors.Join(d.taken.UFFD.Close(), d.vm.Close(), d.reserve.release())
	if err != nil {
		d.log.Warn("cannot release what belonged to an ended destination QEMU", "error", err)
	}
	d.taken, d.vm, d.process, d.reserve, d.blocks, d.claim = nil, nil, nil, nil, nil, process.Identity{}
	return d.prepareQEMU(ctx)
}
