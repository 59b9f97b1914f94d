// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/migrated-vm/migrated/internal/qemu"

// starterCommand runs starterCmd.
const starterCommand = "start-qemus"

// starterCmd is not for operators: "migrated serve" starts it (qemu.Starter).
type starterCmd struct {
	QEMUBinaries []string `arg:"" name:"qemu-binaries" help:"Programs that may be started."`
}

func (s *starterCmd) Run(*app) error { return qemu.ServeStarter(s.QEMUBinaries) }
