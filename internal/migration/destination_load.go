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
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// deviceRequests is the server side of the call LoadDeviceState.
type deviceRequests = grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]

const (
	// A PC keeps its option ROMs below 1 MiB, in the RAM block with the guest's first page. QEMU reads the ROM of its
	// virtual APIC while it loads (hw/i386/kvmvapic.c). On any other machine this is ordinary memory.
	legacyROMs     = 0xc0000
	legacyROMBytes = 128 << 10
	// loadAhead is how many bytes a fault requests while QEMU loads all of the state: what loading reads lies close
	// together. After an early load it is known what QEMU reads, so nothing more is requested: on a connection that
	// was idle, a page that comes with 15 others takes three round trips.
	loadAhead = 64 << 10
	// When QEMU runs the VM, it reads all of a flash that the guest can write, to write it to the flash's image
	// (postload_update_cb in hw/block/pflash_cfi01.c). PC firmware keeps its variables in a flash of half a MiB.
	flashPrefix = "system.flash"
	flashBytes  = 1 << 20
)

// LoadDeviceState has QEMU load the device state that stream brings; first is its first message. It takes a prepared
// destination to loaded. On failure the destination has given up.
func (d *Destination) LoadDeviceState(
	first *migratedv1.LoadDeviceStateRequest, stream deviceRequests,
) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.enter(prepared, loading); err != nil {
		return err
	}
	d.releaseGC = processGC.hold()
	began := time.Now()
	d.kept.header().started.Store(began.UnixNano())
	d.setDeadline(first.GetTotalLeft())
	d.update(func(m *migratedv1.Migration) {
		m.State, m.StartTime = migratedv1.MigrationState_MIGRATION_STATE_DEVICE, timestamppb.New(began)
	})
	carrier, err := d.carrier(first)
	if err != nil {
		d.giveUp(err)
		return err
	}
	answer, err := d.loadFrom(carrier, first, stream)
	if err != nil {
		d.giveUp(err)
		if carrier.run.Load() != nil { // the source no longer continues the VM by itself
			return fmt.Errorf("%w: %w", ErrNotRun, err)
		}
		return err
	}
	testPoint("destination-took")
	if first.GetRehearsal() { // a rehearsal ends here: Run would be out of order
		d.expire(loadedTimeout, "the source did not end the rehearsal")
		return stream.SendAndClose(answer)
	}
	run := carrier.run.Load()
	if err := d.markLoaded(); err != nil { // pump gives the migration up
		if run != nil {
			return fmt.Errorf("%w: %w", ErrNotRun, err)
		}
		return err
	}
	d.expire(loadedTimeout, "the source did not tell the destination to run the VM")
	testPoint("destination-loaded")
	if run != nil {
		if answer.Run, err = d.run(context.WithoutCancel(stream.Context()), run, carrier.began); err != nil {
			return err
		}
	}
	return stream.SendAndClose(answer)
}

func (d *Destination) loadFrom(
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
	if err := checkRAMNotShared(d.vm, d.blocks, "destination"); err != nil {
		return nil, err
	}
	if first.GetPaused() && !first.GetRehearsal() {
		if err := d.vm.TakeDisksWhenLoaded(ctx); err != nil {
			return nil, fmt.Errorf("prepare the destination QEMU: %w", err)
		}
	}

	var early []devicestate.Section // a copy: release clears d.early
	if d.early != nil {
		early = d.early.sections
	}
	received := make(chan struct{})
	receive := func() {
		err := d.receive(ctx, carrier, stream, early)
		close(received)
		if err != nil {
			cancel(err)
		}
	}
	d.prefetchForLoad()
	loading, err := d.beginLoading(ctx, carrier, first)
	if err == nil {
		testPoint("destination-loading")
		go receive()
		// The source stops the VM when it sees this header. From then on, nothing but the stream itself delays
		// loading.
		_ = stream.SendHeader(nil)
		err = loading.Wait(ctx)
	}
	ended := time.Now()
	switch {
	case err == nil:
	case ctx.Err() != nil && d.vm.QMP.Err() == nil: // ctx also ends when QEMU has ended
		return nil, fmt.Errorf("the destination QEMU did not load the device state: %w", causeOf(ctx, d.explain(err)))
	default:
		return nil, withRemedy(fmt.Errorf("the destination QEMU could not load the device state: %w", d.explain(err)),
			d.loadRemedy())
	}
	if first.GetPaused() && !first.GetRehearsal() {
		// QEMU before 10.0 has activated the disks by itself, and only logs a failure.
		if _, err := d.vm.ActivateDisks(ctx); err != nil {
			return nil, fmt.Errorf("take the VM's disks: %w", err)
		}
		if active, err := d.vm.DisksActive(ctx); err != nil || !active {
			return nil, errors.Join(fmt.Errorf("the destination QEMU did not get the VM's disks: %s", d.qemuOutput()), err)
		}
	}
	if err := awaitEnd(ctx, received); err != nil {
		return nil, err
	}
	d.early.close()
	answer := &migratedv1.LoadDeviceStateResponse{
		Bytes: uint64(carrier.received), LoadTime: durationpb.New(ended.Sub(carrier.began)),
	}
	d.loadTime = answer.GetLoadTime()
	if first.GetRehearsal() {
		if answer.Differences, err = d.saveAndCompare(ctx, carrier.kept); err != nil {
			return nil, fmt.Errorf("save the device state again: %w", err)
		}
		answer.CompareTime = durationpb.New(time.Since(ended))
	}
	return answer, nil
}

// awaitEnd waits until the source has sent everything and waits for the answer. QEMU has loaded by then. The error is
// why ctx ended: a source that goes on sending nothing must not keep the destination from giving up.
func awaitEnd(ctx context.Context, received <-chan struct{}) error {
	select {
	case <-received:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-received: // receiving failed, which ended ctx, when QEMU had all that it needs
		return nil
	default:
		return fmt.Errorf("QEMU has loaded the device state, but the source did not end the call that sends it: %w",
			context.Cause(ctx))
	}
}

// carrier returns the sockets for the stream: new ones, or those over which QEMU has loaded the early state.
func (d *Destination) carrier(first *migratedv1.LoadDeviceStateRequest) (carrier *deviceCarrier, err error) {
	switch {
	case first.GetChanges() != (d.early != nil):
		return nil, errors.New("the source and the destination do not agree on whether an early state was loaded")
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

// beginLoading has QEMU read the beginning of the stream, unless it did so during the early load.
func (d *Destination) beginLoading(
	ctx context.Context, carrier *deviceCarrier, first *migratedv1.LoadDeviceStateRequest,
) (*qemu.Loading, error) {
	if d.early != nil { // QEMU reads already; check that it answers before the VM is stopped
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

// receive passes the stream to QEMU: all of the state, or the changes since the early state.
func (d *Destination) receive(
	ctx context.Context, carrier *deviceCarrier, stream deviceRequests, early []devicestate.Section,
) error {
	if d.early == nil {
		return carrier.receiveFrom(stream)
	}
	return carrier.receiveChanges(stream, early, func() error { return d.vm.UnmapRootComplex(ctx) })
}

// prefetchForLoad has the engine request memory that QEMU will read, before QEMU waits for it.
func (d *Destination) prefetchForLoad() {
	var all []postcopy.Range
	if d.early != nil { // memory that QEMU read when it loaded the early state
		for _, p := range d.early.touched {
			size := d.blocks[p.block].PageSize
			if n := len(all); n > 0 && all[n-1].Block == p.block && all[n-1].Offset+all[n-1].Bytes == p.offset {
				all[n-1].Bytes += size
				continue
			}
			all = append(all, postcopy.Range{Block: p.block, Offset: p.offset, Bytes: size})
		}
	}
	for i, b := range d.blocks {
		switch {
		case b.HoldsFirstPage && d.early == nil:
			all = append(all, postcopy.Range{Block: i, Offset: legacyROMs, Bytes: legacyROMBytes})
		case strings.HasPrefix(b.ID, flashPrefix) && b.Size <= flashBytes:
			all = append(all, postcopy.Range{Block: i, Bytes: b.Size})
		}
	}
	d.engine.Foresee(all)
}

// qemuOutput returns what the destination QEMU has written, or where to find it.
func (d *Destination) qemuOutput() string {
	if d.process != nil {
		if said := d.process.ExitReason(); said != "" {
			return said
		}
	}
	return "see what it has logged"
}

// loadRemedy says where to look when QEMU could not load the state. For a domain, QEMU's own message is in libvirt's
// log, unless somebody ended QEMU.
func (d *Destination) loadRemedy() string {
	const compare = "compare machine type, devices and QEMU versions of both sides"
	if d.domain == "" || d.vm.QMP.Err() == nil {
		return compare
	}
	return "see on the destination, in /var/log/libvirt/qemu, why the domain ended; " +
		"if QEMU says nothing there, somebody ended it: migrate the VM again; else " + compare
}
