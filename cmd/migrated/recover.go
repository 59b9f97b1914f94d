// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type recoverCmd struct {
	ID  string `arg:"" predictor:"migration" help:"The migration."`
	Via string `placeholder:"HOST:PORT" help:"Address under which the source's daemon can be reached."`
}

func (recoverCmd) Help() string {
	return `At the destination: makes the connection to the source's pages again now. That happens by itself, with ` +
		`growing pauses and at the addresses that the source named; this is for another address, and for the impatient.

Example:

    # The migration network is down, but there is another
    migrated recover db-1 --via 198.51.100.1:7600`
}

func (r *recoverCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Recover(ctx, &migratedv1.RecoverRequest{Id: r.ID, Via: r.Via})
		if err != nil {
			return c.explain(r.ID, err)
		}
		if a.json {
			return a.printJSON(answer.GetMigration())
		}
		a.printf("Connecting again; see migrated watch %s\n", r.ID)
		return nil
	})
}

type fallbackCmd struct {
	ID   string `arg:"" predictor:"migration" help:"The migration."`
	Gone bool   `name:"destination-is-gone" required:"" help:"You are certain that the VM does not run at the destination and never will again: the host is off, or its QEMU has ended."`
}

func (fallbackCmd) Help() string {
	return `At the source, after the switch, when the destination is lost for good: the VM goes on here as it was at ` +
		`the switch. What it did since then is lost. Were it still running there, it would run twice and corrupt its ` +
		`disks: nobody but you can know.

Its disks are not as they were at the switch. Where it ran at the destination, they have what it wrote there, and ` +
		`its memory here knows nothing of that: a mounted file system can be damaged by going on so. Rather end the VM ` +
		`here, too, and start it anew from its disks, unless nothing was written or its disks can be put back, to a ` +
		`snapshot say.

Example:

    migrated fallback db-1 --destination-is-gone`
}

func (f *fallbackCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.FallBack(ctx, &migratedv1.FallBackRequest{Id: f.ID, DestinationIsGone: f.Gone})
		if err != nil {
			return c.explain(f.ID, err)
		}
		if a.json {
			return a.printJSON(answer.GetMigration())
		}
		a.printf("%s: %s\n", f.ID, answer.GetMigration().GetError().GetVmStatus())
		return nil
	})
}
