// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
)

// The exit codes of all commands. exitCodes explains them to the operator. They
// are part of the command line's interface: add some, but never renumber them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitCheck       = 4
	exitCancelled   = 5
	exitUnknownID   = 6
	exitEnded       = 7
	exitUnderWay    = 8
	exitStillHere   = 9
	exitConfig      = 78  // EX_CONFIG of sysexits(3); not 2, because a Go program that panics ends with that
	exitInterrupted = 130 // 128 + SIGINT, as a shell reports it
)

// exitCodes are shown by "migrated --help".
var exitCodes = []struct {
	code    int
	meaning string
}{
	{exitOK, "done; for migrate and watch: the migration completed"},
	{exitFailed, "the operation or the migration failed; the message says where the VM is"},
	{exitUsage, "the command line is wrong; nothing was done"},
	{exitUnreachable, "the daemon cannot be reached or did not answer in time"},
	{exitCheck, "check found a reason why a migration is not possible; pki show: a certificate has expired"},
	{exitCancelled, "the migration was cancelled; the VM goes on at the source"},
	{exitUnknownID, "the daemon knows no migration of that id"},
	{exitEnded, "the VM ended by itself while it moved: its guest powered off, " +
		"or its QEMU was told to quit; nothing failed"},
	{exitUnderWay, "idle: a migration or an evacuation is under way on this host"},
	{exitStillHere, "evacuate: not all VMs have left this host, or can, or it is not known; the summary says which"},
	{exitConfig, "serve: the command line or the configuration file is wrong, and starting it again does not help"},
	{exitInterrupted, "interrupted while watching; the migration goes on"},
}

// exitCodeHelp formats exitCodes for a help text.
func exitCodeHelp() string {
	var b strings.Builder
	b.WriteString("Exit codes:\n")
	for _, e := range exitCodes {
		fmt.Fprintf(&b, "\n    %3d  %s", e.code, e.meaning)
	}
	return b.String()
}
