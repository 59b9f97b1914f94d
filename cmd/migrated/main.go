// SPDX-License-Identifier: Apache-2.0

// Command migrated is both the daemon that migrates virtual machines ("migrated
// serve") and the operator's way to talk to it (all other commands).
//
// Reading order: cli.go declares the commands and flags, client.go reaches the
// daemon, errors.go turns what it answers into sentences and exit.go into exit
// codes. follow.go watches a migration for the commands that wait for one and
// hands what it sees to one of three displays: bar.go, plain.go or json.go.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// A second signal ends the process at once, as it would without us.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:]))
}
