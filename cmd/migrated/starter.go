// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/confine"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
)

// starterCommand is the name of the command starterCmd.
const starterCommand = "start-qemus"

// starterCmd is not for operators: "migrated serve" starts it (launch.Starter).
type starterCmd struct {
	LibvirtHook  string   `arg:"" name:"libvirt-hook" help:"Program that may change the definition of a domain; empty: none."`
	QEMUBinaries []string `arg:"" optional:"" name:"qemu-binaries" help:"Programs that may be started."`
}

func (s *starterCmd) Run(a *app) error {
	if err := confine.ApplyToStarter(); err != nil { // not fatal: VMs that arrive need this process
		lines := newLogQueue(os.Stderr)
		defer lines.Close()
		a.logger(config.Default(), lines).Warn("the process that starts QEMUs keeps more of its privileges than they need",
			"error", err)
	}
	return launch.ServeStarter(s.LibvirtHook, s.QEMUBinaries)
}
