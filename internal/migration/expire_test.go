// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A destination that its source forgets gives up. One that has moved on does not.
func TestForgottenDestinationGivesUp(t *testing.T) {
	fresh := func(at step) *Destination {
		d := NewDestination(t.Context(), DestinationConfig{
			Request: &migratedv1.PrepareIncomingRequest{Id: "m"}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		})
		d.current.Store(int32(at))
		return d
	}
	forgotten := fresh(prepared)
	forgotten.expire(0, "the source did not start the prepared migration")
	select {
	case <-forgotten.Done():
	case <-time.After(2 * time.Minute):
		t.Fatal("it is kept")
	}
	view, _ := forgotten.Snapshot()
	if !Terminal(view.GetState()) ||
		!strings.Contains(view.GetError().GetMessage(), "did not start the prepared migration within") {
		t.Errorf("it ended as %v", view)
	}
	if _, err := forgotten.Run(context.Background(), &migratedv1.RunRequest{}); !errors.Is(err, ErrNotRun) {
		t.Errorf("Run is answered with %v", err)
	}

	goesOn, again, over := fresh(prepared), fresh(awaitingEarly), fresh(prepared)
	goesOn.mu.Lock()
	goesOn.expire(0, "the source did not start the prepared migration")
	goesOn.moveTo(loading)
	goesOn.mu.Unlock()
	again.mu.Lock()
	again.expire(0, "the source did not send the early device state")
	again.moveTo(loadingEarly) // LoadEarlyState came, and has to come again
	again.moveTo(awaitingEarly)
	again.mu.Unlock()
	over.expire(0, "the source did not start the prepared migration") // expires after those two, on the same clock
	<-over.Done()
	goesOn.mu.Lock()
	defer goesOn.mu.Unlock()
	if goesOn.step() != loading {
		t.Errorf("one that loads was given up: %v", goesOn.reason)
	}
	again.mu.Lock()
	defer again.mu.Unlock()
	if again.step() != awaitingEarly {
		t.Errorf("one that waits for the next try was given up: %v", again.reason)
	}
}
