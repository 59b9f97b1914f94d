// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A reasonedError is an error with a Reason for programs.
type reasonedError struct {
	err    error
	reason migratedv1.Reason
}

func (e *reasonedError) Error() string { return e.err.Error() }
func (e *reasonedError) Unwrap() error { return e.err }

// withReason adds a Reason to err. If err is wrapped several times, the outermost Reason holds.
func withReason(err error, reason migratedv1.Reason) error {
	return &reasonedError{err: err, reason: reason}
}

// reasons maps errors to their Reason. The first match holds.
var reasons = []struct {
	err    error
	reason migratedv1.Reason
}{
	{ErrCancelled, migratedv1.Reason_REASON_CANCELLED},
	{errFallBack, migratedv1.Reason_REASON_FELL_BACK},
	{errReleased, migratedv1.Reason_REASON_RELEASED},
	{errAbandoned, migratedv1.Reason_REASON_ABANDONED},
	{errContinued, migratedv1.Reason_REASON_INTERFERED},
	{errPausedSince, migratedv1.Reason_REASON_INTERFERED},
	{errOurQEMUGone, migratedv1.Reason_REASON_SOURCE_QEMU_ENDED},
	{errOrphan, migratedv1.Reason_REASON_SOURCE_QEMU_ENDED},
	{errQEMUGone, migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED},
	{postcopy.ErrProcessGone, migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED},
	{postcopy.ErrNoMemory, migratedv1.Reason_REASON_NO_MEMORY},
	{postcopy.ErrProtocol, migratedv1.Reason_REASON_PROTOCOL},
	{postcopy.ErrLaneLost, migratedv1.Reason_REASON_PAGES_UNREACHABLE},
	{errDaemonEnded, migratedv1.Reason_REASON_DAEMON_ENDED},
}

// reasonOf returns the Reason of err.
func reasonOf(err error) migratedv1.Reason {
	var reasoned *reasonedError
	if errors.As(err, &reasoned) {
		return reasoned.reason
	}
	if serverSays(err, migratedv1.Reason_REASON_PAGES_UNREADABLE) {
		return migratedv1.Reason_REASON_PAGES_UNREADABLE
	}
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.reason
		}
	}
	var unknown *version.Error
	if errors.As(err, &unknown) {
		return migratedv1.Reason_REASON_VERSION
	}
	return migratedv1.Reason_REASON_UNSPECIFIED
}

// reasonOfStatus returns the Reason of a destination's status that has none of its own.
func reasonOfStatus(code codes.Code) migratedv1.Reason {
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return migratedv1.Reason_REASON_UNREACHABLE
	case codes.Unimplemented:
		return migratedv1.Reason_REASON_VERSION
	case codes.NotFound:
		return migratedv1.Reason_REASON_MIGRATION_UNKNOWN
	case codes.PermissionDenied, codes.ResourceExhausted, codes.FailedPrecondition, codes.AlreadyExists:
		return migratedv1.Reason_REASON_DESTINATION_REFUSED
	}
	return migratedv1.Reason_REASON_UNSPECIFIED
}
