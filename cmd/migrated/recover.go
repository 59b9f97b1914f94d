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
	return `Run on the destination. Reconnects to the source's memory now. The daemon does so by itself, with ` +
		`growing pauses, at the addresses that the source named. Use it to try at once, or at another address.

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
	return `Run on the source, after the switch, when the destination is lost for good. Continues the VM here as it ` +
		`was at the switch; what it did since then is lost. The destination is asked first, and if it answers ` +
		`that it has the VM, the command is refused. If it does not answer and the VM still runs there, it runs ` +
		`twice and corrupts its disks; no daemon can check this.

Its disks are not as they were at the switch: they have what the VM wrote at the destination, and its memory here ` +
		`does not match that. Continuing the VM can damage a mounted file system. End the VM here, too, and start it ` +
		`again from its disks, unless it wrote nothing or its disks can be restored, for example from a snapshot.

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
