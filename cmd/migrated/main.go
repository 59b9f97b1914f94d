// SPDX-License-Identifier: Apache-2.0

// Command migrated is both the daemon that migrates virtual machines ("migrated
// serve") and its command-line client (all other commands).
//
// Reading order: cli.go declares the commands and flags. client.go connects to the
// daemon. errors.go turns its errors into messages, exit.go has the exit codes.
// follow.go watches a migration for the commands that wait for one, and shows it on
// one of three displays: bar.go, plain.go or json.go.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// Restore the default: a second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:]))
}
