// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// An error reaches the operator of the other daemon with its message, its remedy and its code, without gRPC's own
// words.
func TestErrorCrossesTheNetwork(t *testing.T) {
	local := fmt.Errorf("prepare: %w", withRemedy(io.ErrUnexpectedEOF, "plug it in"))
	remote := fromPeer("move", "192.0.2.2:7600", ToStatus(codes.Aborted, local))
	shown := Describe(remote)
	if shown.GetRemedy() != "plug it in" {
		t.Errorf("remedy is %q", shown.GetRemedy())
	}
	if want := "move: destination 192.0.2.2:7600: prepare: unexpected EOF"; shown.GetMessage() != want {
		t.Errorf("message is %q, want %q", shown.GetMessage(), want)
	}
	if got := status.Code(remote); got != codes.Aborted {
		t.Errorf("code is %v", got)
	}
}

// The daemon's own API is also called inside the daemon: the error is the same, with its reason and its remedy.
func TestFromStatus(t *testing.T) {
	full := withRemedy(withReason(errors.New("it is full"), migratedv1.Reason_REASON_NO_MEMORY), "make room")
	want := Describe(full)
	got := Describe(FromStatus(ToStatus(codes.FailedPrecondition, full)))
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := FromStatus(status.Error(codes.Unavailable, "it ends")); err.Error() != "it ends" || Remedy(err) != "" {
		t.Errorf("without details: %v", err)
	}
}

func TestNoErrorStaysNone(t *testing.T) {
	if err := errors.Join(ToStatus(codes.Internal, nil), FromStatus(nil)); err != nil {
		t.Error(err)
	}
}

// The remedy fits what the peer answered.
func TestPeerRemedy(t *testing.T) {
	for code, words := range map[codes.Code]string{
		codes.Unavailable:      "daemon runs and that 192.0.2.2:7600 is reachable",
		codes.PermissionDenied: "'peers' in the destination's configuration",
		codes.Unimplemented:    "migrated version",
		codes.Internal:         "",
	} {
		err := fromPeer("prepare", "192.0.2.2:7600", status.Error(code, "as it is"))
		remedy := Describe(err).GetRemedy()
		if !strings.Contains(remedy, words) || words == "" && remedy != "" {
			t.Errorf("%v: %q", code, remedy)
		}
	}
	err := fromPeer("prepare", "192.0.2.2:7600", status.Error(codes.Unavailable, "connection refused"))
	if !strings.Contains(err.Error(), "cannot be reached: connection refused") {
		t.Error(err)
	}
}

func TestCauseOf(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	failed := errors.New("failed")
	if got := causeOf(ctx, failed); got != failed {
		t.Errorf("before the end: %v", got)
	}
	cancel(ErrCancelled)
	got := causeOf(ctx, failed)
	if !errors.Is(got, ErrCancelled) || !errors.Is(got, failed) {
		t.Errorf("after the end: %v", got)
	}
	if again := causeOf(ctx, got); again.Error() != got.Error() {
		t.Errorf("said twice: %v", again)
	}
	hungUp, hangUp := context.WithCancel(context.Background())
	hangUp()
	if got := causeOf(hungUp, failed); !strings.HasPrefix(got.Error(), "failed") || !errors.Is(got, context.Canceled) {
		t.Errorf("that it was cancelled comes before the reason: %v", got)
	}
}

// A call may notice that all ends before the context of its caller does: the reason is the same.
func TestEndedOf(t *testing.T) {
	caller := t.Context()
	call, cancel := context.WithCancelCause(context.Background())
	if got := firstEnded(caller, call); got != caller {
		t.Error("before the end it is not the caller's")
	}
	cancel(ErrCancelled)
	if got := causeOf(firstEnded(caller, call), errors.New("failed")); !errors.Is(got, ErrCancelled) {
		t.Errorf("after the end: %v", got)
	}
}

// An error about an expired certificate is told apart from one about an unknown authority.
func TestOutOfTime(t *testing.T) {
	for message, want := range map[string]string{
		"connection error: desc = \"error reading server preface: remote error: tls: expired certificate\"": "clocks",
		"authentication handshake failed: tls: failed to verify certificate: x509: certificate has expired " +
			"or is not yet valid: current time 2031-01-01T00:00:00Z is after 2027-01-01T00:00:00Z": "clocks",
		"authentication handshake failed: tls: failed to verify certificate: " +
			"x509: certificate signed by unknown authority": "tls_ca",
	} {
		err := fromPeer("prepare", "192.0.2.1:7600", status.Error(codes.Unavailable, message))
		if remedy := Describe(err).GetRemedy(); !strings.Contains(remedy, want) {
			t.Errorf("%s: remedy %q", message, remedy)
		}
	}
}
