// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type releaseCmd struct {
	ID    string `arg:"" predictor:"migration" help:"The migration."`
	There bool   `name:"vm-is-at-destination" required:"" help:"You are certain that the VM is at the destination with all of its memory, or has ended there."`
}

func (releaseCmd) Help() string {
	return `Run on the source, after the switch, when the destination's daemon lost its state and cannot report the ` +
		`outcome. Ends the migration and the stopped QEMU on this host. Memory that the VM still needs would be ` +
		`lost, so the destination is asked first if it answers.

Example:

    migrated release db-1 --vm-is-at-destination`
}

func (r *releaseCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Release(ctx, &migratedv1.ReleaseRequest{Id: r.ID, VmIsAtDestination: r.There})
		if err != nil {
			return c.explain(r.ID, err)
		}
		return a.printVMStatus(answer.GetMigration())
	})
}

type abandonCmd struct {
	ID   string `arg:"" predictor:"migration" help:"The migration."`
	Gone bool   `name:"source-is-gone" required:"" help:"You are certain that the source, its host or its QEMU, will not come back with the VM's memory."`
}

func (abandonCmd) Help() string {
	return `Run on the destination, after the switch, when the source is lost for good. Ends the VM: the rest of its ` +
		`memory cannot arrive, and threads that need it wait forever. What the VM wrote to its disks is there; start ` +
		`it again from them.

Example:

    migrated abandon db-1 --source-is-gone`
}

func (r *abandonCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Abandon(ctx, &migratedv1.AbandonRequest{Id: r.ID, SourceIsGone: r.Gone})
		if err != nil {
			return c.explain(r.ID, err)
		}
		return a.printVMStatus(answer.GetMigration())
	})
}

// printVMStatus prints where the VM of a migration is.
func (a *app) printVMStatus(m *migratedv1.Migration) error {
	if a.json {
		return a.printJSON(m)
	}
	a.printf("%s: %s\n", m.GetId(), m.GetError().GetVmStatus())
	return nil
}
