// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A waiting is a call of AwaitTurn.
type waiting struct {
	stream grpc.ServerStreamingClient[migratedv1.AwaitTurnResponse]
	hangUp func()
}

func awaitTurn(t *testing.T, peer migratedv1.PeerServiceClient, id string) *waiting {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := peer.AwaitTurn(ctx, &migratedv1.AwaitTurnRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	return &waiting{stream, cancel}
}

// told receives the next answer: granted, or how many are ahead.
func (w *waiting) told(t *testing.T) (granted bool, ahead uint32) {
	t.Helper()
	answer, err := w.stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetGranted(), answer.GetAhead()
}

// incoming returns a request for a migration that fails at once, because the VM has no command line.
func incoming(id string) *migratedv1.PrepareIncomingRequest {
	return &migratedv1.PrepareIncomingRequest{Id: id, Protocol: version.Protocol, OldestProtocol: version.OldestToBegin}
}

// TestAwaitTurn: a place is reserved for the caller that waited for it, used by its PrepareIncoming, and given to the
// next when the caller hangs up.
func TestAwaitTurn(t *testing.T) {
	d := startPlain(t)
	half := d.cfg.MaxIncoming / 2 // what one source may have
	var granted []*waiting
	for i := range half {
		// Each migration has a connection of its own, because a connection may have only a few calls at a time.
		w := awaitTurn(t, migratedv1.NewPeerServiceClient(connect(t, d, honest)), fmt.Sprintf("m-%d", i))
		if ok, ahead := w.told(t); !ok {
			t.Fatalf("migration %d of %d waits, with %d ahead", i+1, half, ahead)
		}
		granted = append(granted, w)
	}
	peer := migratedv1.NewPeerServiceClient(connect(t, d, honest))
	if _, err := peer.PrepareIncoming(t.Context(), incoming("hasty")); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one that did not wait: %v", err)
	}
	first := awaitTurn(t, peer, "late-1")
	if ok, ahead := first.told(t); ok || ahead != 0 {
		t.Fatalf("late-1: granted %v, %d ahead", ok, ahead)
	}
	second := awaitTurn(t, peer, "late-2")
	if ok, ahead := second.told(t); ok || ahead != 1 {
		t.Fatalf("late-2: granted %v, %d ahead", ok, ahead)
	}
	granted[0].hangUp()
	if ok, _ := first.told(t); !ok {
		t.Error("late-1 does not get the place that was left")
	}
	if ok, ahead := second.told(t); ok || ahead != 0 {
		t.Errorf("late-2, now the next: granted %v, %d ahead", ok, ahead)
	}
	// It uses its own place: it is not refused for want of room, but because the VM has no command line.
	if _, err := peer.PrepareIncoming(t.Context(), incoming("late-1")); err == nil ||
		status.Code(err) == codes.ResourceExhausted {
		t.Errorf("late-1, whose turn has come: %v", err)
	}
	if ok, _ := second.told(t); !ok { // late-1 is over
		t.Error("late-2 does not get the place of a migration that is over")
	}
}
