// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type reportCmd struct {
	ID     string `arg:"" predictor:"migration" help:"The migration."`
	Output string `short:"o" enum:"text,json,html" default:"text" help:"text, json (as --json) or html, a page that needs nothing beside it (default: ${default})."`
	Role   string `enum:"any,source,destination" default:"any" help:"Which side, if this host is both source and destination."`
	File   string `placeholder:"PATH" predictor:"file" help:"Write it to this file instead of standard output."`
}

func (reportCmd) Help() string {
	return `Shows all that is known of a migration, for a ticket: where the VM is, what was slow and why, the steps of ` +
		`the downtime, how long page faults took, and what runs on both hosts. Each of the two hosts has a report of its ` +
		`own; the source's has what the destination told at the end. The reports of the last migrations are kept when they ` +
		`are over, also while no daemon runs (report_keep in its configuration). docs/report.md explains what is in them.

Examples:

    migrated report db-1
    migrated report db-1 --output html --file db-1.html

    # In a script: what was slow
    migrated report db-1 --json | jq -r '.findings[].text'`
}

func (rc *reportCmd) Run(a *app) error {
	number := migratedv1.MigrationRole_value["MIGRATION_ROLE_"+strings.ToUpper(rc.Role)] // any: 0, which is unspecified
	role := migratedv1.MigrationRole(number)
	a.json = a.json || rc.Output == "json"
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Report(ctx, &migratedv1.ReportRequest{Id: rc.ID, Role: role})
		if err != nil {
			return c.explain(rc.ID, err)
		}
		var out bytes.Buffer
		switch r := answer.GetReport(); {
		case a.json:
			line, err := jsonLine(r)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, "%s\n", line)
		case rc.Output == "html":
			err = writeReportPage(&out, r)
		default:
			err = printReport(&out, r)
		}
		if err != nil {
			return err
		}
		if rc.File != "" {
			return os.WriteFile(rc.File, out.Bytes(), 0o600)
		}
		a.printf("%s", out.String())
		return nil
	})
}

// reportTitle returns the title of a report.
func reportTitle(r *migratedv1.Report) string {
	m := r.GetMigration()
	return fmt.Sprintf("Migration %s of %s, report of the %s", m.GetId(), vmName(m), migration.RoleName(m.GetRole()))
}

// madeText says when a report was made, and in which time zone its times are.
func madeText(r *migratedv1.Report) string {
	zone := r.GetTime().AsTime().Local().Format("MST (UTC-07:00)")
	return fmt.Sprintf("Made at %s. Times are in %s, each by the clock of the host that it is about.",
		timeText(r.GetTime()), zone)
}

// reportFacts returns the facts that "migrated status" shows as well.
func reportFacts(r *migratedv1.Report) []fact {
	facts := statusFacts(r.GetMigration())
	if rehearsal := r.GetMigration().GetRehearsal(); rehearsal != nil {
		facts = append(facts, rehearsalFacts(rehearsal)...)
	}
	return facts
}

// printReport prints a report as text.
func printReport(out io.Writer, r *migratedv1.Report) error {
	fmt.Fprintf(out, "%s\n%s\n\n", reportTitle(r), madeText(r))
	if err := printFacts(out, reportFacts(r)); err != nil {
		return err
	}
	if len(r.GetFindings()) > 0 {
		fmt.Fprint(out, "\nWhat was slow, and why\n")
		for _, f := range r.GetFindings() {
			fmt.Fprintf(out, "- %s\n", oneLine(f.GetText()))
		}
	}
	for _, s := range reportSections(r) {
		fmt.Fprintf(out, "\n%s\n", s.Title)
		if s.Note != "" {
			fmt.Fprintln(out, s.Note)
		}
		if err := s.print(out); err != nil {
			return err
		}
	}
	return nil
}

// barWidth is the width of the longest bar, in characters.
const barWidth = 24

// print prints the table, a row on each line. Bars are in a column of their own, after the one that they are about.
func (s section) print(out io.Writer) error {
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	line := func(cells []string, bar string) {
		if s.Bars != "" {
			cells = append(append(cells[:barCell+1:barCell+1], bar), cells[barCell+1:]...)
		}
		fmt.Fprintf(w, "  %s\n", strings.Join(cells, "\t"))
	}
	line(s.Columns, "")
	for _, r := range s.Rows {
		line(r.Cells, r.Bar.text())
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for text := range strings.Lines(table.String()) { // remove spaces at the ends of lines
		if _, err := fmt.Fprintln(out, strings.TrimRight(text, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// text returns a bar as text. A bar that is not empty has at least one character.
func (b *span) text() string {
	if b == nil || b.To <= b.From {
		return ""
	}
	from := min(barWidth-1, int(math.Round(b.From*barWidth)))
	to := int(math.Round(b.To * barWidth))
	return strings.Repeat(" ", from) + strings.Repeat("#", max(1, to-from))
}
