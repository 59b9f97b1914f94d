// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/pkg/client"
)

// A failure says to the operator why a command ends with an exit code other than
// 0. If it has no message, the command has printed the reason already.
type failure struct {
	exit    int
	message string // what went wrong
	vm      string // where the VM is now; empty: it is not about a VM
	remedy  string // what to do next; empty: nothing
}

func (f *failure) Error() string { return f.message }

// report prints err for the operator, and returns its exit code.
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

// indent indents all lines of a text but the first. It also escapes the text, because errors of calls,
// which may quote others' text, are printed only through it.
func indent(text string) string { return strings.ReplaceAll(printable.Text(text), "\n", "\n    ") }

// explain turns the error of a call into a failure. id is the migration that
// the call was about; empty: none.
func (c *daemonClient) explain(id string, err error) error {
	var told *client.Error
	if err = c.Explain(err); !errors.As(err, &told) {
		return err
	}
	f := &failure{exit: exitFailed, message: told.Message, vm: told.VMStatus}
	switch told.GRPCStatus().Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		if errors.Is(err, client.ErrUnreachable) { // otherwise the daemon answered that the other host is unreachable
			return c.unreachable(told)
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
		f.message = "the daemon does not know this command: " + f.message
		f.remedy = `compare the versions with "migrated version" and update the older one`
	case codes.Unauthenticated, codes.PermissionDenied:
		f.message = "the daemon refused: " + f.message
	case codes.Internal, codes.Unknown:
		f.message = "the daemon failed: " + f.message
		f.remedy = `its log says more: "journalctl -u migrated"`
	}
	if told.Remedy != "" { // the daemon's remedy is better than one for the status code
		f.remedy = told.Remedy
	}
	return f
}

// unreachable explains why there was no answer, by the error of the last attempt
// to connect.
func (c *daemonClient) unreachable(told *client.Error) error {
	f := &failure{exit: exitUnreachable, message: "cannot reach the daemon at " + c.app.daemon + ": "}
	path, isUnix := c.SocketPath()
	cause := told.Unwrap()
	start := `start the daemon with "systemctl start migrated" (or "migrated serve" in a terminal), ` +
		`or name another with --daemon or MIGRATED_DAEMON`
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
		f.remedy = "run the command as root (sudo), or as a member of the daemon's socket_group: " +
			"nobody else controls the VMs of this host"
	case told.GRPCStatus().Code() == codes.DeadlineExceeded && !errors.As(cause, new(*net.OpError)):
		f.message = fmt.Sprintf("the daemon at %s did not answer within %v", c.app.daemon, c.app.timeout)
		f.remedy = `try a longer --timeout; "journalctl -u migrated" says what the daemon is doing`
	case cause != nil:
		f.message += cause.Error()
		f.remedy = "check the address given by --daemon or MIGRATED_DAEMON"
	default:
		f.message = "the daemon at " + c.app.daemon + " went away: " + told.Message
		f.remedy = `see "systemctl status migrated"`
	}
	return f
}
