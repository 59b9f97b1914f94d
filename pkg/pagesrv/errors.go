// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

var (
	// ErrNotStopped says that the VM whose pages are asked for is not stopped, or cannot be shown to
	// be: codes.FailedPrecondition.
	ErrNotStopped = errors.New("the VM is not stopped, its pages cannot be served")
	// ErrWithdrawn says that the source took its offer back: codes.Aborted.
	ErrWithdrawn = errors.New("the source has withdrawn the pages of this VM")
	// ErrRefused says that the migration is not offered, or no longer, or that the token is wrong. The peer is not told
	// which, so that nobody can find out ids by asking: codes.PermissionDenied.
	ErrRefused = errors.New("the source does not offer this migration, or the token is wrong")
	// ErrTooManyLanes says that an export serves MaxLanes lanes already: codes.ResourceExhausted.
	ErrTooManyLanes = errors.New("too many lanes for one migration")
	// ErrBadRange says that a range is outside of the RAM or not of whole pages: codes.InvalidArgument.
	ErrBadRange = errors.New("invalid page range")
	// ErrRAM says that RAM of the VM could not be read: codes.DataLoss.
	ErrRAM = errors.New("cannot read the RAM of the VM")
	// ErrOffered says that a migration of that id is offered already.
	ErrOffered = errors.New("this migration is offered already")
)

// A laneError ends a lane: an error for this process, a status for the peer.
type laneError struct {
	code codes.Code
	err  error
}

func (e *laneError) Error() string { return e.err.Error() }
func (e *laneError) Unwrap() error { return e.err }

// reasons are told to a peer for those errors that it handles in a way of their own. The first match holds. A peer must
// not read the text.
var reasons = []struct {
	err    error
	reason migratedv1.Reason
}{
	{ErrProcessGone, migratedv1.Reason_REASON_SOURCE_QEMU_ENDED},
	{ErrRefused, migratedv1.Reason_REASON_PAGES_REFUSED},
	{ErrRAM, migratedv1.Reason_REASON_PAGES_UNREADABLE},
}

// GRPCStatus has a MigrationError with the reason among its details, where there is one.
func (e *laneError) GRPCStatus() *status.Status {
	st := status.New(e.code, e.err.Error())
	for _, r := range reasons {
		if errors.Is(e.err, r.err) {
			if detailed, err := st.WithDetails(&migratedv1.MigrationError{Reason: r.reason}); err == nil {
				return detailed
			}
		}
	}
	return st
}

func endLane(code codes.Code, err error, format string, args ...any) error {
	if format != "" {
		err = fmt.Errorf("%w: %w", err, fmt.Errorf(format, args...))
	}
	return &laneError{code, err}
}
