// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type listCmd struct {
	Label    map[string]string `mapsep:"none" placeholder:"KEY=VALUE" help:"Only migrations that have this label; may be given several times."`
	Role     string            `enum:"any,source,destination" default:"any" help:"Only those of which this host is the source, or the destination (default: ${default})."`
	UnderWay bool              `help:"Only those that are not over."`
	Watch    bool              `short:"w" help:"Go on, and print a line whenever a migration is added, has changed or is removed."`
}

func (listCmd) Help() string {
	return `Lists the migrations that the daemon knows, those away from this host and those to it, newest first.

Examples:

    migrated list

    # Those of one evacuation that are not over, and what becomes of them
    migrated list --label evacuation=host-a-7 --under-way --watch

    # The ids of those that are not over
    migrated list --under-way --json | jq -r '.migrations[].id'`
}

// filter returns the filter that the flags describe.
func (l *listCmd) filter() *migratedv1.MigrationFilter {
	role := migratedv1.MigrationRole_value["MIGRATION_ROLE_"+strings.ToUpper(l.Role)] // any: 0, which is unspecified
	return &migratedv1.MigrationFilter{Labels: l.Label, Role: migratedv1.MigrationRole(role), UnderWay: l.UnderWay}
}

func (l *listCmd) Run(a *app) error {
	if l.Watch {
		return l.watch(a)
	}
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		all, version, err := c.ListAll(ctx, l.filter())
		if err != nil {
			return c.explain("", err)
		}
		if a.json {
			return a.printJSON(&migratedv1.ListResponse{Migrations: all, ResourceVersion: version})
		}
		if len(all) == 0 {
			a.printf("This daemon knows no migrations.\n")
			return nil
		}
		w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "ID\tVM\tROLE\tSTATE\tLOCATION\tMEMORY\tDOWNTIME\tDESTINATION\tSTARTED")
		for _, m := range all {
			p := m.GetProgress()
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.GetId(), vmName(m),
				migration.RoleName(m.GetRole()), migration.StateName(m.GetState()), locationName(m.GetLocation()),
				percent(p), durationText(p.GetDowntime()), orDash(m.GetSpec().GetDestination()), timeText(m.GetCreateTime()))
		}
		return w.Flush()
	})
}

// watch prints changes until the command is interrupted. It fails if the daemon cannot be reached at first, and goes on
// if the daemon restarts later.
func (l *listCmd) watch(a *app) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithCancelCause(a.ctx)
	defer cancel(nil)
	unanswered := time.AfterFunc(a.timeout, func() { cancel(context.DeadlineExceeded) })
	defer unanswered.Stop()
	show := func(event migratedv1.ListEvent, m *migratedv1.Migration) {
		if a.json {
			// It came through gRPC: see printMessage.
			_ = a.printJSON(&migratedv1.WatchListResponse{Event: event, Migration: m})
			return
		}
		a.printf("%-8s%s\n", migration.Name(event, "LIST_EVENT_"), lineOf(m, m.GetId()+" "+migration.RoleName(m.GetRole())))
	}
	synced := false
	err = client.NewFollower(c.Client, l.filter(), client.Handlers{
		Added:   func(m *migratedv1.Migration) { show(migratedv1.ListEvent_LIST_EVENT_ADDED, m) },
		Changed: func(_, m *migratedv1.Migration) { show(migratedv1.ListEvent_LIST_EVENT_CHANGED, m) },
		Removed: func(m *migratedv1.Migration) { show(migratedv1.ListEvent_LIST_EVENT_REMOVED, m) },
		Synced: func() {
			synced = true
			unanswered.Stop()
		},
		Lost: func(err error) {
			if !synced {
				cancel(err)
			}
		},
	}).Run(ctx)
	if a.ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return &failure{exit: exitInterrupted}
	}
	return c.explain("", err)
}

type deleteCmd struct {
	ID string `arg:"" predictor:"migration" help:"The migration."`
}

func (deleteCmd) Help() string {
	return `Forgets a migration that is over, and its report, on this host alone; its id can be used again. It is ` +
		`refused while what this host knows of it protects the VM, for example while the other host has not heard ` +
		`how it ended.

Examples:

    migrated delete db-1

    # All of one evacuation that are over
    migrated list --label evacuation=host-a-7 --json | jq -r '.migrations[] | select(.endTime) | .id' | ` +
		`xargs -rn 1 migrated delete`
}

func (d *deleteCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Delete(ctx, &migratedv1.DeleteRequest{Id: d.ID})
		if err != nil {
			return c.explain(d.ID, err)
		}
		if a.json {
			return a.printJSON(answer)
		}
		a.printf("%s is forgotten on this host.\n", d.ID)
		return nil
	})
}

// labelsText returns labels as "a=1, b=2", in the order of their keys.
func labelsText(labels map[string]string) string {
	var all []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		all = append(all, key+"="+labels[key])
	}
	return strings.Join(all, ", ")
}
