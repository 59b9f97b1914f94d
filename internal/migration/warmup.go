// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// deviceChunk is the most of a device state that one message carries. With its
	// header it fits a buffer of 16 KiB: the next larger that gRPC's pool has is of
	// 1 MiB, and to clear one for every message costs more than all of the copying.
	deviceChunk = 16<<10 - 64
	// warmBytes is what a connection carries in one round trip after warmUp, about: the state of a dozen devices.
	warmBytes = 448 << 10
	// shortRoundTrip is one that is not worth warming up for.
	shortRoundTrip = time.Millisecond
	// longestRoundTrip is what is waited at most between two steps.
	longestRoundTrip = 250 * time.Millisecond
)

// padding is what warmUp sends.
var padding [deviceChunk]byte

// warmUp makes a connection ready for the device state, while the VM still runs. One that was idle carries 14 KB in its
// first round trip, twice that in the next (RFC 6928, RFC 5681): at a round trip of 10 ms a state of 250 KB would take
// 43 ms.
func warmUp(ctx context.Context, stream deviceStream, roundTrip time.Duration) error {
	if roundTrip < shortRoundTrip {
		return nil
	}
	for step, sent := deviceChunk, 0; sent < warmBytes; step *= 2 {
		for n := 0; n < step; n += len(padding) {
			if err := stream.Send(&migratedv1.LoadDeviceStateRequest{Padding: padding[:]}); err != nil {
				return err
			}
		}
		sent += step
		crossed := time.NewTimer(min(roundTrip, longestRoundTrip))
		select {
		case <-crossed.C:
		case <-ctx.Done():
			crossed.Stop()
			return context.Cause(ctx)
		}
	}
	return nil
}
