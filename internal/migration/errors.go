// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/redact"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

var (
	// ErrCancelled is the final error of a migration that somebody cancelled.
	ErrCancelled = errors.New("the migration was cancelled")
	// ErrCommitted says that the VM was handed over: it is too late to cancel.
	ErrCommitted = errors.New("the VM was handed over to the destination already")
	// ErrNotRun is the destination's promise that it has not run the VM and never will.
	ErrNotRun = errors.New("the destination has not run the VM and never will")
	// errAskAgain says that a destination does not know yet whether it runs the VM.
	errAskAgain = errors.New("it is not known yet whether the VM runs")
)

// Remedies for a *version.Error.
const (
	otherDaemon = "start the version of migrated that wrote it, or a newer one: it goes on with the migration; " +
		"nothing was changed, and the VM waits"
	sameVersions = "run the same version of migrated on both hosts, or two consecutive ones"
)

// A remediedError is an error with a remedy: what an operator can do about it.
type remediedError struct {
	err    error
	remedy string
}

func (e *remediedError) Error() string { return e.err.Error() }
func (e *remediedError) Unwrap() error { return e.err }

// withRemedy adds a remedy to err.
func withRemedy(err error, remedy string) error {
	return &remediedError{err: err, remedy: remedy}
}

// WithRemedy adds a remedy to err: what an operator can do about it.
func WithRemedy(err error, remedy string) error { return withRemedy(err, remedy) }

// ListAgain adds to err the reason LIST_AGAIN, which tells a program that follows the list of migrations to start
// again.
func ListAgain(err error) error {
	return withRemedy(withReason(err, migratedv1.Reason_REASON_LIST_AGAIN),
		"list the migrations again, from the first page")
}

// Remedy returns what an operator can do about err; empty: that is not known.
func Remedy(err error) string { return Describe(err).GetRemedy() }

// qemuQueryError wraps the error of a question to a QEMU process. which is "source" or "destination".
func qemuQueryError(which string, err error) error {
	err = fmt.Errorf("ask the %s QEMU about its VM: %w", which, err)
	if errors.Is(err, fs.ErrPermission) {
		return withRemedy(err, "the daemon may not look into a process of that user: "+
			"run it as root, or with the capabilities of deploy/migrated.service, CAP_SYS_PTRACE above all")
	}
	return err
}

// Describe returns err as the API shows it.
func Describe(err error) *migratedv1.MigrationError {
	shown := &migratedv1.MigrationError{Message: redact.Text(err.Error()), Reason: reasonOf(err)}
	defer printable.Valid(shown)
	var remedied *remediedError
	if errors.As(err, &remedied) {
		shown.Remedy = redact.Text(remedied.remedy)
	}
	return shown
}

// ToStatus turns err into a gRPC status that keeps its remedy and reason; nil stays nil. errAskAgain replaces code with
// Unknown, after which the source asks again.
func ToStatus(code codes.Code, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, errAskAgain) {
		code = codes.Unknown
	}
	shown := Describe(err)
	st, detailErr := status.New(code, shown.GetMessage()).WithDetails(shown)
	if detailErr != nil {
		return status.Error(code, shown.GetMessage())
	}
	return st.Err()
}

// fromPeer turns an error that a call to the destination returned back into one with a reason and a remedy. step says
// what was being done, peer is the destination's address. status.Code still finds the code.
func fromPeer(step, peer string, err error) error {
	st := status.Convert(err)
	wrapped := fmt.Errorf("%s: destination %s: %w", step, peer, &peerError{st})
	reason, _ := detailsOf(st)
	if reason == migratedv1.Reason_REASON_UNSPECIFIED {
		reason = reasonOfStatus(st.Code())
	}
	return withTold(wrapped, reason, PeerRemedy(peer, err))
}

// withTold adds to err the reason and the remedy that another daemon, or this one's API, told, where it told one.
func withTold(err error, reason migratedv1.Reason, remedy string) error {
	if reason != migratedv1.Reason_REASON_UNSPECIFIED { // else keep a reason that an error inside may have
		err = withReason(err, reason)
	}
	if remedy != "" {
		err = withRemedy(err, remedy)
	}
	return err
}

// FromPeer is fromPeer for calls to the destination that other packages make.
func FromPeer(step, peer string, err error) error { return fromPeer(step, peer, err) }

// FromStatus turns an error that a call to this daemon's own API returned back into one with the reason and the remedy
// of its status; nil stays nil.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	reason, remedy := detailsOf(st)
	return withTold(errors.New(st.Message()), reason, remedy)
}

// detailsOf returns the reason and the remedy that a status carries, if it does. See ToStatus.
func detailsOf(st *status.Status) (reason migratedv1.Reason, remedy string) {
	for _, detail := range st.Details() {
		if shown, ok := detail.(*migratedv1.MigrationError); ok {
			reason, remedy = shown.GetReason(), shown.GetRemedy()
		}
	}
	return reason, remedy
}

// PeerRemedy returns what an operator can do about an error that a call to the daemon at peer, a destination, returned.
// Empty: that is not known.
func PeerRemedy(peer string, err error) string {
	st := status.Convert(err)
	if _, remedy := detailsOf(st); remedy != "" {
		return remedy
	}
	switch st.Code() {
	case codes.Unavailable:
		if outOfTime(st.Message()) {
			return "correct the clocks of both hosts, or renew the certificates"
		}
		if handshakeFailed(st.Message()) {
			return "use TLS on both hosts or on neither, with certificates of the same tls_ca " +
				"and names that are among the other's peers; the destination's log says whom it refused"
		}
		return fmt.Sprintf("make sure that the destination's daemon runs and that %s is reachable from this host", peer)
	case codes.PermissionDenied:
		return "add a name of this host's certificate to 'peers' in the destination's configuration, and have its daemon " +
			"reload that (systemctl reload migrated)"
	case codes.Unimplemented:
		return fmt.Sprintf("%s does not answer as a migrated daemon of this version; "+
			"look at --to and at 'migrated version' there", peer)
	default:
		return ""
	}
}

// handshakeFailed reports whether a peer answered but no connection came about. gRPC passes the reason on as text only.
func handshakeFailed(message string) bool {
	return strings.Contains(message, "handshake failed") || strings.Contains(message, "error reading server preface") ||
		strings.Contains(message, "tls: ")
}

// outOfTime reports whether a certificate is expired or not yet valid by the clock of either host. gRPC passes the
// reason on as text only: that of crypto/x509, or that of the TLS alert from the other side (crypto/tls).
func outOfTime(message string) bool {
	return strings.Contains(message, "expired certificate") ||
		strings.Contains(message, "certificate has expired or is not yet valid")
}

// A peerError prints a gRPC status in its own words, without "rpc error: …".
type peerError struct{ st *status.Status }

func (e *peerError) Error() string {
	switch e.st.Code() {
	case codes.Unavailable:
		return "cannot be reached: " + e.st.Message()
	case codes.DeadlineExceeded:
		return "did not answer in time"
	default:
		return e.st.Message()
	}
}

// GRPCStatus lets status.Code find the code inside wrapped errors.
func (e *peerError) GRPCStatus() *status.Status { return e.st }

// causeOf adds to err why ctx ended, and puts that first. A plain context.Canceled goes last: that the caller hung up
// is not a reason by itself.
func causeOf(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	switch {
	case cause == nil || err == nil || errors.Is(err, cause):
		return err
	case errors.Is(cause, context.Canceled):
		return fmt.Errorf("%w (%w)", err, cause)
	}
	return fmt.Errorf("%w (%w)", cause, err)
}

// firstEnded returns the first of ctxs that has ended, or ctxs[0] if none has. A gRPC call has a context of its own.
// When a parent context ends, the call's may end a moment before its caller's.
func firstEnded(ctxs ...context.Context) context.Context {
	for _, ctx := range ctxs {
		if ctx.Err() != nil {
			return ctx
		}
	}
	return ctxs[0]
}
