// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"

	"google.golang.org/grpc"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A PC has its option ROMs below 1 MiB, in the RAM that QEMU was given first. Among them is that of QEMU's virtual APIC, which
// it reads while it loads (hw/i386/kvmvapic.c). To any other machine this is memory like any.
const (
	legacyROMs     = 0xc0000
	legacyROMBytes = 128 << 10
)

// LoadDeviceState brings a prepared destination to loaded: QEMU has taken in
// its whole stream. When it fails the destination has given up.
func (d *Destination) LoadDeviceState(stream grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.expect(prepared); err != nil {
		return err
	}
	d.phase = loading
	d.releaseGC = garbage.hold()
	d.setState(migratedv1.MigrationState_MIGRATION_STATE_DEVICE)
	total, err := d.load(stream)
	if err != nil {
		d.giveUp(err)
		return err
	}
	reached("destination-took")
	d.phase = loaded
	d.kept.header().loaded.Store(1)
	d.expire(loaded, loadedTimeout, "the source did not say go")
	reached("destination-loaded")
	return stream.SendAndClose(&migratedv1.LoadDeviceStateResponse{Bytes: total})
}

func (d *Destination) load(stream grpc.ClientStreamingServer[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]) (uint64, error) {
	carrier, err := newDeviceCarrier()
	if err != nil {
		return 0, err
	}
	defer carrier.close()
	bounded, expire := context.WithTimeoutCause(d.loadCtx, loadTimeout, fmt.Errorf("it did not come within %v", loadTimeout))
	defer expire()
	ctx, cancel := context.WithCancelCause(bounded)
	defer cancel(nil)
	stop := context.AfterFunc(stream.Context(), func() { cancel(context.Cause(stream.Context())) })
	defer stop()

	go func() {
		if err := carrier.receiveFrom(stream); err != nil {
			cancel(err)
		}
	}()
	d.engine.Foresee(0, legacyROMs, legacyROMBytes)
	// The source's QEMU begins when it sees this header: from then on nothing
	// but the stream itself is between the VM's stop and its loading.
	err = d.vm.MigrateIncomingFD(ctx, carrier.qemu, func() {
		reached("destination-loading")
		_ = stream.SendHeader(nil)
	})
	switch {
	case err == nil:
		// QEMU knows where its stream ends; what gRPC says of the end has time.
		return carrier.received.Load(), nil
	case ctx.Err() != nil:
		return 0, fmt.Errorf("the destination QEMU did not load the device state: %w", causeOf(ctx, d.explain(err)))
	default:
		return 0, withRemedy(fmt.Errorf("the destination QEMU did not load the device state: %w", d.explain(err)),
			"compare machine type, devices and QEMU versions of both sides")
	}
}
