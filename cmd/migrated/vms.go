// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type vmsCmd struct{}

func (vmsCmd) Help() string {
	return `Lists the VMs that run on this host, as they are found at this moment: the QEMUs among its processes, by ` +
		`the QMP sockets on their command lines, and the domains of its libvirt. The first column is what --vm takes.

Examples:

    migrated vms

    # Check each
    migrated vms --json | jq -r '.vms[].vm | select(. != "")' | while read -r vm; do migrated check --vm "$vm"; done`
}

func (vmsCmd) Run(a *app) error {
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.ListVMs(ctx, &migratedv1.ListVMsRequest{})
		if err != nil {
			return c.explain("", err)
		}
		if a.json {
			return a.printJSON(answer)
		}
		if len(answer.GetVms()) == 0 {
			a.printf("No VM runs on this host.\n")
			return nil
		}
		w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "VM\tNAME\tPID\tREMARK")
		for _, vm := range answer.GetVms() {
			fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", orDash(vm.GetVm()), orDash(vm.GetName()), vm.GetPid(), orDash(worthKnowing(vm)))
		}
		return w.Flush()
	})
}

// worthKnowing returns what an operator should know about a VM of this host; empty: nothing.
func worthKnowing(vm *migratedv1.HostVM) string {
	switch {
	case vm.GetMigration() != "":
		return "being migrated by " + vm.GetMigration()
	case vm.GetHandedOver():
		return "handed over to another host; this QEMU is kept for its memory"
	case vm.GetElsewhere():
		return "runs in a container (other namespaces): not managed by this daemon"
	}
	return vm.GetProblem()
}
