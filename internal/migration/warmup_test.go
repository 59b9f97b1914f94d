// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A countingStream is a stream that counts the bytes of padding that it is given.
type countingStream struct {
	deviceStream

	sent  int
	fails error
}

func (c *countingStream) Send(m *migratedv1.LoadDeviceStateRequest) error {
	c.sent += len(m.GetPadding())
	return c.fails
}

// Padding is sent at the pace of an idle connection: the amount doubles with each round trip.
func TestWarmUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c countingStream
		began := time.Now()
		if err := warmUp(t.Context(), &c, 10*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 50*time.Millisecond || c.sent != 31*deviceChunk { // 1, 2, 4, 8 and 16 of them
			t.Errorf("%d bytes in %v", c.sent, took)
		}
	})
}

// A round trip that was measured at a bad moment delays the switch only a little. For a short round trip nothing is
// sent.
func TestWarmUpIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if err := warmUp(t.Context(), &countingStream{}, time.Hour); err != nil || time.Since(began) != 5*longestRoundTrip {
			t.Errorf("it took %v, %v", time.Since(began), err)
		}
		var c countingStream
		if err := warmUp(t.Context(), &c, shortRoundTrip/2); err != nil || c.sent != 0 {
			t.Errorf("%d bytes, %v", c.sent, err)
		}
	})
}

func TestWarmUpEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		if err := warmUp(t.Context(), &countingStream{fails: broken}, time.Second); !errors.Is(err, broken) {
			t.Error(err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		gaveUp := errors.New("gave up")
		time.AfterFunc(time.Millisecond, func() { cancel(gaveUp) })
		if err := warmUp(ctx, &countingStream{}, time.Second); !errors.Is(err, gaveUp) {
			t.Error(err)
		}
	})
}
