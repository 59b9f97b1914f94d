// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// The kinds of an *Error, for errors.Is.
var (
	// ErrNotFound: the daemon has no migration with that id.
	ErrNotFound = errors.New("no such migration")
	// ErrExists: a migration with that id has another specification.
	ErrExists = errors.New("the id is taken")
	// ErrInvalid: the request is wrong, and can never succeed.
	ErrInvalid = errors.New("the request is wrong")
	// ErrRefused: the request cannot succeed now. Remedy says what to do.
	ErrRefused = errors.New("refused")
	// ErrForbidden: this caller may not do that.
	ErrForbidden = errors.New("forbidden")
	// ErrTooMany: the allowed number is under way already.
	ErrTooMany = errors.New("too many at once")
	// ErrListAgain: a list cannot be followed from that version. A Follower lists again by itself.
	ErrListAgain = errors.New("list again")
	// ErrUnreachable: the daemon did not answer. It may have done what was requested.
	ErrUnreachable = errors.New("the daemon cannot be reached")

	// ErrFailed, ErrCancelled and ErrEnded are the ends of a migration that did not complete: it failed, somebody
	// cancelled it, or the VM ended by itself at the destination. A migration that completed has failed, too, if somebody
	// continued the VM at the source meanwhile: it runs on both hosts (REASON_INTERFERED).
	ErrFailed    = errors.New("the migration failed")
	ErrCancelled = errors.New("the migration was cancelled")
	ErrEnded     = errors.New("the VM ended by itself")
)

// kinds maps gRPC's codes to kinds. An Error with another code has no kind.
var kinds = map[codes.Code]error{
	codes.NotFound:           ErrNotFound,
	codes.AlreadyExists:      ErrExists,
	codes.InvalidArgument:    ErrInvalid,
	codes.FailedPrecondition: ErrRefused,
	codes.PermissionDenied:   ErrForbidden,
	codes.Unauthenticated:    ErrForbidden,
	codes.ResourceExhausted:  ErrTooMany,
	codes.Unavailable:        ErrUnreachable,
	codes.DeadlineExceeded:   ErrUnreachable,
}

// Error says why a call or a migration failed, for operators and for programs.
type Error struct {
	// Message says what went wrong, from the outermost step to the innermost cause.
	Message string
	// Remedy says what to do about it. It is empty if the daemon has no advice.
	Remedy string
	// VMStatus says where the VM is. It is empty if the error is about no VM, or the daemon does not say.
	VMStatus string
	// Reason is what went wrong, for programs. More values will be added.
	Reason migratedv1.Reason
	// Told is true if Remedy, VMStatus and Reason come from the daemon itself.
	Told bool

	kind   error // nil if there is none
	cause  error // why there is no connection; nil if there is one, or the cause is unknown
	status *status.Status
}

// Error returns Message.
func (e *Error) Error() string { return e.Message }

// Is reports whether the error is of that kind, one of this package's Err values.
func (e *Error) Is(kind error) bool { return e.kind != nil && e.kind == kind }

// Unwrap returns why the last attempt to connect failed, for example a *net.OpError. If a call ended with its context,
// it returns context.Canceled or context.DeadlineExceeded. It returns nil if there is no cause.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus returns the status, for status.Code and similar functions.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Explain makes an *Error from a gRPC status or from a context's error, which the caller made itself. It returns an
// error of this client, nil and io.EOF unchanged.
func (c *Client) Explain(err error) error { return c.target.explain(err) }

func (t *target) explain(err error) error {
	if err == nil || errors.Is(err, io.EOF) || errors.As(err, new(*Error)) {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	e := &Error{Message: s.Message(), kind: kinds[s.Code()], status: s}
	for _, detail := range s.Details() {
		if told, ok := detail.(*migratedv1.MigrationError); ok {
			e.Told, e.Remedy, e.VMStatus, e.Reason = true, told.GetRemedy(), told.GetVmStatus(), told.GetReason()
		}
	}
	switch {
	case e.Reason == migratedv1.Reason_REASON_LIST_AGAIN:
		e.kind = ErrListAgain
	case e.Is(ErrUnreachable) && e.Told: // this daemon answered; it could not reach another host
		e.kind = ErrRefused
	case e.Is(ErrUnreachable):
		e.cause = t.lastError()
	}
	switch {
	case e.cause != nil:
	case s.Code() == codes.Canceled:
		e.cause = context.Canceled
	case s.Code() == codes.DeadlineExceeded:
		e.cause = context.DeadlineExceeded
	}
	return e
}

// Outcome is the error of a migration that failed, was cancelled or ended, or after which the VM runs on both hosts. It
// is nil if the migration completed otherwise, was rehearsed, or is still under way.
func Outcome(m *migratedv1.Migration) error {
	var kind error
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED:
		kind = ErrFailed
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		if m.GetError().GetReason() != migratedv1.Reason_REASON_INTERFERED {
			return nil
		}
		kind = ErrFailed
	case migratedv1.MigrationState_MIGRATION_STATE_CANCELLED:
		kind = ErrCancelled
	case migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		kind = ErrEnded
	default:
		return nil
	}
	told := m.GetError()
	e := &Error{
		Message: "migration " + m.GetId() + ": " + told.GetMessage(), Remedy: told.GetRemedy(),
		VMStatus: told.GetVmStatus(), Reason: told.GetReason(), Told: true, kind: kind,
	}
	e.status = status.New(codes.Aborted, e.Message)
	return e
}

// Over reports whether a migration in this state is over.
func Over(s migratedv1.MigrationState) bool {
	switch s {
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.MigrationState_MIGRATION_STATE_FAILED,
		migratedv1.MigrationState_MIGRATION_STATE_CANCELLED, migratedv1.MigrationState_MIGRATION_STATE_REHEARSED,
		migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return true
	}
	return false
}
