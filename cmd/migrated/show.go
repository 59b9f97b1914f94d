// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type statusCmd struct {
	ID string `arg:"" predictor:"migration" help:"The migration."`
}

func (statusCmd) Help() string {
	return `Shows one migration with all its figures. The exit code says whether it could be shown, not how the ` +
		`migration stands; "migrated watch" tells that.

Examples:

    migrated status db-1
    migrated status db-1 --json | jq -r .state

    # In a script: where the VM is, and why something is wrong
    migrated status db-1 --json | jq -r '.location, .error.reason'`
}

func (s *statusCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Get(ctx, &migratedv1.GetRequest{Id: s.ID})
		if err != nil {
			return c.explain(s.ID, err)
		}
		if a.json {
			return a.printJSON(answer.GetMigration())
		}
		return printStatus(a.stdout, answer.GetMigration())
	})
}

// printStatus prints all that is known of a migration, one fact on each line.
func printStatus(out io.Writer, m *migratedv1.Migration) error {
	if err := printFacts(out, statusFacts(m)); err != nil || m.GetRehearsal() == nil {
		return err
	}
	return printRehearsal(out, m.GetRehearsal())
}

// A fact is a name and a value to be shown.
type fact struct{ Name, Value string }

// printFacts prints each fact on a line. A value of several lines is indented.
func printFacts(out io.Writer, facts []fact) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, f := range facts {
		fmt.Fprintf(w, "%s\t%s\n", f.Name, strings.ReplaceAll(f.Value, "\n", "\n\t"))
	}
	return w.Flush()
}

// statusFacts returns all that is known of a migration, without the results of a rehearsal.
func statusFacts(m *migratedv1.Migration) (facts []fact) {
	add := func(name, format string, args ...any) {
		facts = append(facts, fact{name, fmt.Sprintf(format, args...)})
	}
	p, spec := m.GetProgress(), m.GetSpec()
	add("Migration", "%s", m.GetId())
	add("State", "%s: %s", migration.StateName(m.GetState()), stateMeaning(m))
	add("Location", "%s", locationName(m.GetLocation()))
	if e := m.GetError(); e != nil {
		add("Error", "%s", e.GetMessage())
		if e.GetReason() != migratedv1.Reason_REASON_UNSPECIFIED {
			add("Reason", "%s", reasonName(e.GetReason()))
		}
		add("Where it is", "%s", orDash(e.GetVmStatus()))
		add("What to do", "%s", orDash(e.GetRemedy()))
	}
	add("VM", "%s", vmName(m))
	if labels := spec.GetLabels(); len(labels) > 0 {
		add("Labels", "%s", labelsText(labels))
	}
	add("This host is", "the %s", migration.RoleName(m.GetRole()))
	add("QMP socket", "%s", orDash(spec.GetVm()))
	add("Destination", "%s", orDash(spec.GetDestination()))
	if spec.GetDestinationQmp() != "" {
		add("QMP socket there", "%s", spec.GetDestinationQmp())
	}
	if spec.GetDestinationTemplate() != "" {
		add("Template there", "%s", spec.GetDestinationTemplate())
	}
	if q := m.GetDestinationQemu(); q != nil {
		add("QEMU there", "process %d, %s%s", q.GetPid(), q.GetQmp(), prefixed(", its log is ", q.GetLog()))
	}
	if spec.GetKeepSource() {
		add("Source QEMU", "is kept")
	}
	if spec.GetRequireSecure() {
		add("Required", "a supervised userfaultfd")
	}
	if limit := p.GetBandwidth(); limit > 0 {
		add("Bandwidth", "at most %s for what no thread waits for, %s/s now",
			limitText(limit), bytesText(uint64(p.GetSweepBytesPerSecond())))
	}
	if text := supervisionText(m); text != "" {
		add("Userfaultfd", "%s", text)
	}
	if text := earlyLoadText(m.GetEarlyLoad()); text != "" {
		add("Early load", "%s", text)
	}
	for _, line := range m.GetRamFiles() {
		add("RAM file", "%s", line)
	}
	if m.GetDefinition() != "" {
		add("Definition", "%s", m.GetDefinition())
	}
	switch {
	case p.GetPagesPresent() == 0 && p.GetPagesTotal() > 0:
		add("Memory", "%s in %s, all at the source", bytesText(p.GetBytesTotal()), plural(p.GetPagesTotal(), "page"))
	case p.GetPagesTotal() > 0:
		add("Memory", "%s: %d of %s, %d of them zero; %s", percent(p), p.GetPagesPresent(),
			plural(p.GetPagesTotal(), "page"), p.GetPagesZero(), bytesText(p.GetBytesTotal()))
		add("On the wire", "%s of pages, %s of device state, %s now",
			bytesText(p.GetBytesOnWire()), bytesText(p.GetBytesDeviceState()), rateText(p.GetBytesPerSecond()))
		if n := p.GetBulkLanes(); n > 1 {
			add("Connections", "%d for the sweep: more than one make it faster here", n)
		}
		add("Faults", "%d: p50 %s, p99 %s, max %s",
			p.GetFaults(), durationText(p.GetFaultP50()), durationText(p.GetFaultP99()), durationText(p.GetFaultMax()))
		if n := p.GetPagesGuessed(); n > 0 {
			add("Prefetched", "%d pages before a fault; %.0f %% of the predictions were right",
				n, 100*p.GetGuessHits())
		}
		if n := p.GetBytesDiscarded(); n > 0 {
			add("Discarded", "%s by the guest, not fetched", bytesText(n))
		}
		if n := p.GetPagesTouched(); n > 0 {
			add("Touched", "%s by another process before they arrived: written again, the VM's memory is correct",
				plural(n, "page"))
		}
		if n := p.GetPagesUnexplained(); n > 0 {
			add("UNEXPLAINED", "%s existed before their content came: the VM's memory may be corrupt", plural(n, "page"))
		}
		if n := p.GetPagesLost(); n > 0 {
			add("LOST", "%s that the source could not read: the VM gets a machine check where it touches one", plural(n, "page"))
		}
		add("Downtime", "%s", durationText(p.GetDowntime()))
	}
	if p.GetTimeLeft() != nil {
		add("Time left", "%s", durationText(p.GetTimeLeft()))
	}
	if p.GetResidency() != nil {
		add("All memory after", "%s", durationText(p.GetResidency()))
	}
	for _, l := range []struct {
		what  string
		limit *durationpb.Duration
	}{
		{"prepared", spec.GetPrepareLimit()}, {"switched over", spec.GetSwitchLimit()},
		{"with all memory", spec.GetTotalLimit()},
	} {
		if l.limit != nil {
			add("Limit", "%s within %s", l.what, durationText(l.limit))
		}
	}
	if m.GetOverdue() {
		add("OVERDUE", "total_limit passed before all memory arrived; the migration continues")
	}
	add("Started", "%s", timeText(m.GetCreateTime()))
	if m.GetSwitchTime() != nil {
		add("Switched over", "%s", timeText(m.GetSwitchTime()))
	}
	if m.GetEndTime() != nil {
		add("Ended", "%s", timeText(m.GetEndTime()))
	}
	add("Last change", "%s", timeText(m.GetUpdateTime()))
	return facts
}

type watchCmd struct {
	ID       string        `arg:"" predictor:"migration" help:"The migration."`
	Interval time.Duration `default:"1s" help:"Shortest time between two lines if standard output is no terminal (default: ${default})."`
}

func (watchCmd) Help() string {
	return `Follows a migration until it is over. On a terminal that is a bar; anywhere else it is a line for each ` +
		`change of state, and one an interval of the figures. The exit code is the migration's: 0 where it completed.

Examples:

    migrated watch db-1

    # Start several, then wait for each
    migrated migrate --detach --id db-1 --vm /run/qemu/db.qmp --to host-b
    migrated migrate --detach --id web-1 --vm /run/qemu/web.qmp --to host-b
    migrated watch db-1 && migrated watch web-1`
}

func (w *watchCmd) Run(a *app) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	m, err := c.follow(w.ID, a.display(w.Interval), toTheEnd)
	if err != nil {
		return err
	}
	return outcome(m)
}

type cancelCmd struct {
	ID string `arg:"" predictor:"migration" help:"The migration."`
}

func (cancelCmd) Help() string {
	return `Gives up a migration whose VM has not switched over; the VM goes on at the source. After the switch it is ` +
		`refused: part of the VM's memory is only at the destination, and only completing the migration unites it.

Example:

    migrated cancel db-1`
}

func (cc *cancelCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Cancel(ctx, &migratedv1.CancelRequest{Id: cc.ID})
		if err != nil {
			return c.explain(cc.ID, err)
		}
		m := answer.GetMigration()
		if !migration.Terminal(m.GetState()) { // the VM is being given back to the source
			unseen := &throttled{print: func(*migratedv1.Migration) {}}
			if m, err = c.follow(cc.ID, unseen, toTheEnd); err != nil {
				return err
			}
		}
		if a.json {
			return a.printJSON(m)
		}
		a.printf("%s: %s\n", m.GetId(), stateMeaning(m))
		return nil
	})
}
