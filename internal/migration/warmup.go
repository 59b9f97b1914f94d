// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// deviceChunk is how many bytes of device state one message carries at most. With its header it fits a buffer of
	// 16 KiB. The next larger buffer in gRPC's pool has 1 MiB, and clearing one per message costs more than all of
	// the copying.
	deviceChunk = 16<<10 - 64
	// warmBytes is roughly what a connection carries in one round trip after warmUp: the state of a dozen devices.
	warmBytes = 448 << 10
	// shortRoundTrip is the round trip below which warming up is not worth it.
	shortRoundTrip = time.Millisecond
	// longestRoundTrip bounds the wait between two steps.
	longestRoundTrip = 250 * time.Millisecond
)

// padding is the content of the messages that warmUp sends.
var padding [deviceChunk]byte

// warmUp opens a connection's congestion window for the device state, while the VM still runs. An idle connection
// carries 14 KB in its first round trip and twice that in the next (RFC 6928, RFC 5681). With a round trip of 10 ms,
// a state of 250 KB would take 43 ms.
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
