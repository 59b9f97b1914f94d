// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// deviceRequests is the call that brings the state of the devices.
type deviceRequests = grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]

const (
	// A PC has its option ROMs below 1 MiB, in the RAM that QEMU was given first. Among them is that of QEMU's virtual
	// APIC, which it reads while it loads (hw/i386/kvmvapic.c). To any other machine this is memory like any.
	legacyROMs     = 0xc0000
	legacyROMBytes = 128 << 10
	// loadAhead is what a fault of loading all of the state asks for, in bytes: what loading reads lies together. After an
	// early load what is read is known, and a page that comes with 15 others takes a connection that was idle three round
	// trips.
	loadAhead = 64 << 10
	// QEMU reads all of a flash that the guest can write when it runs the VM (postload_update_cb in
	// hw/block/pflash_cfi01.c): it writes it to the flash's image. Firmware of a PC keeps its variables in one of half a
	// MiB.
	flashPrefix = "system.flash"
	flashBytes  = 1 << 20
)

// LoadDeviceState brings a prepared destination to loaded: QEMU has taken in
// all of the stream, of which first is the first message. When it fails the destination has given up.
func (d *Destination) LoadDeviceState(
	first *migratedv1.LoadDeviceStateRequest, stream deviceRequests,
) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.expect(prepared); err != nil {
		return err
	}
	d.phase = loading
	d.releaseGC = garbage.hold()
	d.setState(migratedv1.MigrationState_MIGRATION_STATE_DEVICE)
	carrier, err := d.carrier(first)
	if err != nil {
		d.giveUp(err)
		return err
	}
	answer, err := d.load(carrier, first, stream)
	if err != nil {
		d.giveUp(err)
		if carrier.run.Load() != nil { // the source does not continue the VM by itself any more
			return fmt.Errorf("%w: %w", ErrNotRun, err)
		}
		return err
	}
	reached("destination-took")
	if first.GetRehearsal() { // it stays in this phase: Run is out of order
		d.expire(loading, loadedTimeout, "the source did not end the rehearsal")
		return stream.SendAndClose(answer)
	}
	d.phase = loaded
	d.kept.header().loaded.Store(1)
	d.expire(loaded, loadedTimeout, "the source did not say go")
	reached("destination-loaded")
	if run := carrier.run.Load(); run != nil {
		if answer.Run, err = d.run(context.WithoutCancel(stream.Context()), run, carrier.began); err != nil {
			return err
		}
	}
	return stream.SendAndClose(answer)
}

func (d *Destination) load(
	carrier *deviceCarrier, first *migratedv1.LoadDeviceStateRequest, stream deviceRequests,
) (*migratedv1.LoadDeviceStateResponse, error) {
	defer carrier.close()
	limit := max(loadTimeout, 2*freezeLimit(d.cfg.Request.GetSpec()))
	bounded, expire := context.WithTimeoutCause(d.loadCtx, limit, fmt.Errorf("it did not come within %v", limit))
	defer expire()
	ctx, cancel := context.WithCancelCause(bounded)
	defer cancel(nil)
	stop := context.AfterFunc(stream.Context(), func() { cancel(context.Cause(stream.Context())) })
	defer stop()
	if err := checkAlone(d.vm, d.blocks, "destination"); err != nil {
		return nil, err
	}
	if first.GetPaused() && !first.GetRehearsal() {
		if err := d.vm.TakeDisksWhenLoaded(ctx); err != nil {
			return nil, fmt.Errorf("prepare the destination QEMU: %w", err)
		}
	}

	var early []devicestate.Section // which release forgets
	if d.early != nil {
		early = d.early.sections
	}
	received := make(chan struct{})
	receive := func() {
		defer close(received)
		if err := d.receive(ctx, carrier, stream, early); err != nil {
			cancel(err)
		}
	}
	d.foresee()
	loading, err := d.beginLoading(ctx, carrier, first)
	if err == nil {
		reached("destination-loading")
		go receive()
		// The source stops the VM when it sees this header: from then on nothing
		// but the stream itself is between the VM's stop and its loading.
		_ = stream.SendHeader(nil)
		err = loading.Wait(ctx)
	}
	ended := time.Now()
	switch {
	case err == nil:
	case ctx.Err() != nil && d.vm.QMP.Err() == nil: // a QEMU that has ended ends ctx, too
		return nil, fmt.Errorf("the destination QEMU did not load the device state: %w", causeOf(ctx, d.explain(err)))
	default:
		return nil, withRemedy(fmt.Errorf("the destination QEMU could not load the device state: %w", d.explain(err)), d.loadRemedy())
	}
	if first.GetPaused() && !first.GetRehearsal() {
		// QEMU before 10.0 has taken them by itself, and only logs that it could not have them.
		if _, err := d.vm.ActivateDisks(ctx); err != nil {
			return nil, fmt.Errorf("take the VM's disks: %w", err)
		}
		if active, err := d.vm.DisksActive(ctx); err != nil || !active {
			return nil, errors.Join(fmt.Errorf("the destination QEMU did not get the VM's disks: %s", d.said()), err)
		}
	}
	<-received // all has been sent: the source waits for the answer
	d.early.close()
	answer := &migratedv1.LoadDeviceStateResponse{
		Bytes: uint64(carrier.received), LoadTime: durationpb.New(ended.Sub(carrier.began)),
	}
	d.loadTime = answer.GetLoadTime()
	if first.GetRehearsal() {
		if answer.Differences, err = d.saveAgain(ctx, carrier.kept); err != nil {
			return nil, fmt.Errorf("save the device state again: %w", err)
		}
		answer.CompareTime = durationpb.New(time.Since(ended))
	}
	return answer, nil
}

// carrier is what the stream goes over: a new one, or the one over which QEMU has loaded the early state.
func (d *Destination) carrier(first *migratedv1.LoadDeviceStateRequest) (carrier *deviceCarrier, err error) {
	switch {
	case first.GetChanges() != (d.early != nil):
		return nil, errors.New("the source and this host do not agree on whether an early state was loaded")
	case d.early == nil:
		if carrier, err = newDeviceCarrier(); err != nil {
			return nil, err
		}
	case first.GetPaused():
		return nil, errPausedSince
	default:
		carrier = d.early.carrier
	}
	carrier.keep = first.GetRehearsal()
	return carrier, nil
}

// beginLoading has QEMU read the beginning of the stream, if it has not done so.
func (d *Destination) beginLoading(
	ctx context.Context, carrier *deviceCarrier, first *migratedv1.LoadDeviceStateRequest,
) (*qemu.Loading, error) {
	if d.early != nil { // it reads already; a QEMU that does not answer is no reason to stop the VM
		return d.early.loading, checkIncoming(ctx, d.vm)
	}
	loading, err := d.vm.BeginLoading(ctx, carrier.qemu)
	if err != nil {
		return nil, err
	}
	if _, err := carrier.ours.Write(first.GetData()); err != nil {
		return nil, fmt.Errorf("pass the device state to QEMU: %w", err)
	}
	return loading, nil
}

// receive passes the stream to QEMU, all of it or the changes since the early state.
func (d *Destination) receive(
	ctx context.Context, carrier *deviceCarrier, stream deviceRequests, early []devicestate.Section,
) error {
	if d.early == nil {
		return carrier.receiveFrom(stream)
	}
	return carrier.receiveChanges(stream, early, func() error { return d.vm.UnmapRootComplex(ctx) })
}

// foresee asks for what QEMU will read, before it waits for it.
func (d *Destination) foresee() {
	var all []postcopy.Stretch
	if d.early != nil { // what loading the early state has read
		for _, p := range d.early.touched {
			size := d.blocks[p.block].PageSize
			if n := len(all); n > 0 && all[n-1].Block == p.block && all[n-1].Offset+all[n-1].Bytes == p.offset {
				all[n-1].Bytes += size
				continue
			}
			all = append(all, postcopy.Stretch{Block: p.block, Offset: p.offset, Bytes: size})
		}
	}
	for i, b := range d.blocks {
		switch {
		case b.HoldsFirstPage && d.early == nil:
			all = append(all, postcopy.Stretch{Block: i, Offset: legacyROMs, Bytes: legacyROMBytes})
		case strings.HasPrefix(b.ID, flashPrefix) && b.Size <= flashBytes:
			all = append(all, postcopy.Stretch{Block: i, Bytes: b.Size})
		}
	}
	d.engine.Foresee(all)
}

// said is what the destination QEMU has written.
func (d *Destination) said() string {
	if d.process != nil {
		if said := d.process.ExitReason(); said != "" {
			return said
		}
	}
	return "see what it has logged"
}

// loadRemedy says where to look when QEMU could not load. A domain's QEMU says why to libvirt, if it was not ended.
func (d *Destination) loadRemedy() string {
	const compare = "compare machine type, devices and QEMU versions of both sides"
	if d.domain == "" || d.vm.QMP.Err() == nil {
		return compare
	}
	return "see on the destination, in /var/log/libvirt/qemu, why the domain ended; if QEMU says nothing there, somebody ended it: " +
		"migrate the VM again; else " + compare
}
