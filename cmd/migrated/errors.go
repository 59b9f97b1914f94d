// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/printable"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A failure is why a command ends with another exit code than 0, in words for
// the operator. One without a message has been told already.
type failure struct {
	exit    int
	message string // what went wrong
	vm      string // where the VM is now; empty where no VM is concerned
	remedy  string // what to do next; empty where there is nothing to do
}

func (f *failure) Error() string { return f.message }

// report tells the operator what err is and returns the exit code for it.
func (a *app) report(err error) int {
	if err == nil {
		return exitOK
	}
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{exit: exitFailed, message: err.Error()}
	}
	switch {
	case f.message == "":
	case a.json:
		type object struct {
			Message  string `json:"message"`
			VMStatus string `json:"vmStatus,omitempty"`
			Remedy   string `json:"remedy,omitempty"`
			ExitCode int    `json:"exitCode"`
		}
		line, _ := json.Marshal(map[string]object{"error": {f.message, f.vm, f.remedy, f.exit}})
		fmt.Fprintf(a.stderr, "%s\n", line)
	default:
		fmt.Fprintf(a.stderr, "migrated: %s\n", indent(f.message))
		if f.vm != "" {
			fmt.Fprintf(a.stderr, "  Where the VM is: %s\n", indent(f.vm))
		}
		if f.remedy != "" {
			fmt.Fprintf(a.stderr, "  What to do: %s\n", indent(f.remedy))
		}
	}
	return f.exit
}

// indent sets the further lines of a text of several lines off. Errors of calls come this way alone, and may quote others.
func indent(text string) string { return strings.ReplaceAll(printable.Text(text), "\n", "\n    ") }

// explain turns the error of a call into a failure. id is the migration that
// the call was about, empty where it was about none.
func (c *client) explain(id string, err error) error {
	if err == nil {
		return nil
	}
	s := status.Convert(err)
	f := &failure{exit: exitFailed, message: s.Message()}
	// The daemon knows better than a status code what to do.
	var told *migratedv1.MigrationError
	for _, detail := range s.Details() {
		if e, ok := detail.(*migratedv1.MigrationError); ok {
			told = e
		}
	}
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		// With a remedy it is the daemon's answer: the other host is away.
		if told == nil {
			return c.unreachable(s)
		}
	case codes.Canceled:
		if errors.Is(c.app.ctx.Err(), context.Canceled) {
			return &failure{exit: exitInterrupted, message: "interrupted before the daemon answered",
				remedy: `see "migrated list" for whether it did what was asked`}
		}
	case codes.NotFound:
		f.exit = exitUnknownID
		f.remedy = `"migrated list" shows the migrations that this daemon knows`
	case codes.AlreadyExists:
		f.remedy = fmt.Sprintf(`choose another --id, or see what %q is with "migrated status %s"`, id, id)
	case codes.InvalidArgument:
		f.exit = exitUsage
	case codes.FailedPrecondition:
		if id != "" {
			f.remedy = fmt.Sprintf("see where it is with \"migrated status %s\"", id)
		}
	case codes.Unimplemented:
		f.message = "the daemon does not know this command: " + s.Message()
		f.remedy = `compare the versions with "migrated version" and update the older one`
	case codes.Unauthenticated, codes.PermissionDenied:
		f.message = "the daemon refused: " + s.Message()
	case codes.Internal, codes.Unknown:
		f.message = "the daemon failed: " + s.Message()
		f.remedy = `its log says more: "journalctl -u migrated"`
	}
	if told != nil {
		f.vm = told.GetVmStatus()
		if told.GetRemedy() != "" {
			f.remedy = told.GetRemedy()
		}
	}
	return f
}

// unreachable explains why there was no answer, by what the last attempt to
// connect said.
func (c *client) unreachable(s *status.Status) error {
	f := &failure{exit: exitUnreachable, message: "cannot reach the daemon at " + c.app.daemon + ": "}
	path, isUnix := c.target.unixPath()
	cause := c.target.lastError()
	start := `start the daemon with "systemctl start migrated" (or "migrated serve" in a terminal), or name another with --daemon or MIGRATED_DAEMON`
	switch {
	case errors.Is(cause, fs.ErrNotExist):
		f.message += "the socket " + path + " does not exist"
		f.remedy = start
	case errors.Is(cause, syscall.ECONNREFUSED) && isUnix:
		f.message += "nobody listens at the socket, the daemon has ended"
		f.remedy = start + `; "journalctl -u migrated" says why it ended`
	case errors.Is(cause, syscall.ECONNREFUSED):
		f.message += "nobody listens there"
		f.remedy = "check the address, and on that host that control_listen is set and the daemon runs"
	case errors.Is(cause, fs.ErrPermission):
		f.message += "this user may not connect to it"
		f.remedy = "run the command as root (sudo), or as a member of the daemon's socket_group: nobody else controls the VMs of this host"
	case cause != nil:
		f.message += cause.Error()
		f.remedy = "check the address given by --daemon or MIGRATED_DAEMON"
	case s.Code() == codes.DeadlineExceeded:
		f.message = fmt.Sprintf("the daemon at %s did not answer within %v", c.app.daemon, c.app.timeout)
		f.remedy = `try a longer --timeout; "journalctl -u migrated" says what the daemon is doing`
	default:
		f.message = "the daemon at " + c.app.daemon + " went away: " + s.Message()
		f.remedy = `see "systemctl status migrated"`
	}
	return f
}
