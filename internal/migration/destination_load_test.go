// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"testing"
)

// TestDestinationDoesNotWaitForASourceThatSendsNothing: a source that does not end the call that brings the device
// state holds the destination's lock only until the call's time limit, or until the destination gives up.
func TestDestinationDoesNotWaitForASourceThatSendsNothing(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	late := errors.New("it is late")
	cancel(late)
	open, ended := make(chan struct{}), make(chan struct{})
	close(ended)
	if err := awaitEnd(ctx, open); !errors.Is(err, late) {
		t.Errorf("a call that goes on: %v", err)
	}
	if err := awaitEnd(ctx, ended); err != nil {
		t.Errorf("a call that has ended: %v", err)
	}
	if err := awaitEnd(t.Context(), ended); err != nil {
		t.Errorf("a call that has ended in time: %v", err)
	}
}
