// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type checkCmd struct {
	VM string `name:"vm" placeholder:"PATH" predictor:"file" help:"QMP Unix socket of a VM to check as well; or libvirt:NAME, a domain of libvirt's."`
	To string `placeholder:"HOST[:PORT]" help:"Daemon of a destination host to check as well (default port: ${port})."`

	ToQMP    string `name:"to-qmp" placeholder:"PATH" xor:"qemu" help:"As for migrate: the QEMU there that would take the VM."`
	Template string `placeholder:"NAME" xor:"qemu" help:"As for migrate: a template there of the command line of its QEMU."`

	XML string `name:"xml" placeholder:"FILE" predictor:"file" help:"As for migrate: the definition of the domain there."`

	RequireSecure bool `help:"As for migrate: refuse a destination whose userfaultfds SELinux does not supervise."`
}

// longCheck is the shortest timeout of a check that starts a QEMU.
const longCheck = 2 * time.Minute

func (checkCmd) Help() string {
	return `Says whether this host can migrate VMs and, where asked, whether a certain VM can be migrated and a certain ` +
		`host can take it. It changes nothing. With --vm and --to, the destination starts a QEMU as for the migration, ` +
		`compares its VM with the one that runs here, and ends it again: check refuses what migrate would refuse, in the ` +
		`same words; --timeout is 2m at the least then. Each thing that was looked at is a line: ok, warning (a migration ` +
		`is possible) or FAILED (it is not), with what to do below.

Examples:

    migrated check
    migrated check --vm /run/qemu/db.qmp --to host-b
    migrated check --vm /run/qemu/db.qmp --to host-b --template db

    # In a script: what stands in the way
    migrated check --json | jq -r '.results[] | select(.status == "CHECK_STATUS_FAILED") | .remedy'`
}

func (cc *checkCmd) Run(a *app) error {
	to := cc.To
	if to != "" {
		var err error
		if to, err = withPort(to); err != nil {
			return &failure{exit: exitUsage, message: fmt.Sprintf("--to %s: %v", cc.To, err),
				remedy: `see "migrated check --help" for examples`}
		}
	}
	definition, err := readXML(cc.XML)
	if err != nil {
		return &failure{exit: exitUsage, message: fmt.Sprintf("--xml: %v", err),
			remedy: `see "migrated check --help" for examples`}
	}
	if cc.VM != "" && to != "" { // the destination starts a QEMU, which may take as long as for a migration
		a.timeout = max(a.timeout, longCheck)
	}
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.Check(ctx, &migratedv1.CheckRequest{
			Vm: localPath(a.daemon, cc.VM), Destination: to, DestinationQmp: cc.ToQMP, DestinationTemplate: cc.Template,
			RequireSecure: cc.RequireSecure, DestinationXml: definition,
		})
		if err != nil {
			return c.explain("", err)
		}
		if a.json {
			err = a.printJSON(answer)
		} else {
			err = printChecks(a.stdout, columns(a.stdout), answer.GetResults())
		}
		if err != nil {
			return err
		}
		if count(answer.GetResults(), migratedv1.CheckStatus_CHECK_STATUS_FAILED) > 0 {
			return &failure{exit: exitCheck} // the results are the message
		}
		return nil
	})
}

// statusWords are the words for the outcome of a check. Failures stand out
// without color.
var statusWords = map[migratedv1.CheckStatus]string{
	migratedv1.CheckStatus_CHECK_STATUS_UNSPECIFIED: "?",
	migratedv1.CheckStatus_CHECK_STATUS_OK:          "ok",
	migratedv1.CheckStatus_CHECK_STATUS_WARNING:     "warning",
	migratedv1.CheckStatus_CHECK_STATUS_FAILED:      "FAILED",
}

// printChecks prints the results in the daemon's order, and a summary. Lines of more than width columns are wrapped
// within their last column; 0: they are not wrapped.
func printChecks(out io.Writer, width int, results []*migratedv1.CheckResult) error {
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, r := range results {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", statusWords[r.GetStatus()], migration.RoleName(r.GetHost()),
			r.GetSubject(), oneLine(r.GetDetail()))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	// Remedies are put between the lines now, because tabwriter would make them columns.
	for i, line := range strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n") {
		line = strings.TrimRight(line, " ")
		if i >= len(results) {
			fmt.Fprintln(out, line)
			continue
		}
		detail := utf8.RuneCountInString(strings.TrimSuffix(line, oneLine(results[i].GetDetail())))
		fmt.Fprintln(out, wrapped(line, detail, width))
		if remedy := results[i].GetRemedy(); remedy != "" {
			for line := range strings.SplitSeq(
				"         what to do: "+strings.ReplaceAll(remedy, "\n", "\n             "), "\n",
			) {
				fmt.Fprintln(out, wrapped(line, 13, width))
			}
		}
	}
	failed := count(results, migratedv1.CheckStatus_CHECK_STATUS_FAILED)
	warnings := count(results, migratedv1.CheckStatus_CHECK_STATUS_WARNING)
	verdict := "a migration is possible"
	if failed > 0 {
		verdict = "a migration is not possible"
	}
	_, err := fmt.Fprintf(out, "\n%d checked, %s, %d FAILED: %s.\n",
		len(results), plural(uint64(warnings), "warning"), failed, verdict)
	return err
}

func count(results []*migratedv1.CheckResult, status migratedv1.CheckStatus) int {
	n := 0
	for _, r := range results {
		if r.GetStatus() == status {
			n++
		}
	}
	return n
}

// oneLine makes one line of a text, which could break a table otherwise.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
