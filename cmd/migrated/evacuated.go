// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/migrated-vm/migrated/internal/evacuation"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/printable"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// evacuationMeaning describes the state of an evacuation.
func evacuationMeaning(view *migratedv1.Evacuation) string {
	counts := countVMs(view)
	switch view.GetState() {
	case migratedv1.EvacuationState_EVACUATION_STATE_PLANNING:
		return "the VMs are looked for and checked; nothing is moved yet"
	case migratedv1.EvacuationState_EVACUATION_STATE_RUNNING:
		return "under way: " + counts
	case migratedv1.EvacuationState_EVACUATION_STATE_PAUSED:
		return "paused: " + counts
	case migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING:
		return "cancelled, and VMs that were handed over are followed: " + counts
	case migratedv1.EvacuationState_EVACUATION_STATE_DONE:
		return "over: " + counts + prefixed("; ", view.GetError().GetMessage())
	case migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED:
		return "cancelled: " + counts + prefixed("; ", view.GetError().GetMessage())
	case migratedv1.EvacuationState_EVACUATION_STATE_PLANNED:
		return "a plan, and nothing was moved: " + counts
	case migratedv1.EvacuationState_EVACUATION_STATE_FAILED:
		return "there is no plan, and nothing was moved: " + view.GetError().GetMessage()
	default:
		return "a state that this program does not know"
	}
}

// vmStateName returns the name of a state: "cannot-move".
func vmStateName(s migratedv1.EvacuatedVMState) string {
	return migration.Name(s, "EVACUATED_VM_STATE_")
}

// countVMs returns the number of VMs in each state: "12 VMs, 10 moved, 2 waiting".
func countVMs(view *migratedv1.Evacuation) string {
	counts := make(map[migratedv1.EvacuatedVMState]int)
	for _, vm := range view.GetVms() {
		counts[vm.GetState()]++
	}
	parts := []string{plural(uint64(len(view.GetVms())), "VM")}
	for s := range int32(len(migratedv1.EvacuatedVMState_name)) {
		if n := counts[migratedv1.EvacuatedVMState(s)]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, vmStateName(migratedv1.EvacuatedVMState(s))))
		}
	}
	return strings.Join(parts, ", ")
}

func (a *app) printEvacuations(all []*migratedv1.Evacuation) error {
	if len(all) == 0 {
		a.printf("This daemon knows no evacuations.\n")
		return nil
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSTATE\tVMS\tDESTINATIONS\tBEGAN")
	for _, view := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", view.GetId(), migration.Name(view.GetState(), "EVACUATION_STATE_"),
			countVMs(view), strings.Join(view.GetSpec().GetDestinations(), ", "), timeText(view.GetCreateTime()))
	}
	return w.Flush()
}

// printPlan prints a table of the VMs of an evacuation, and below it the remarks about them.
func (a *app) printPlan(view *migratedv1.Evacuation) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	if len(view.GetVms()) > 0 {
		fmt.Fprintln(w, "VM\tMEMORY\tHELD\tDESTINATION\tWEIGHT\tSTATE\tLOCATION\tDOWNTIME")
	}
	for _, vm := range view.GetVms() {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", evacuatedName(vm), bytesText(vm.GetBytes()),
			bytesText(vm.GetBytesHeld()), orDash(vm.GetDestination()), orDash(weightText(view.GetSpec(), vm)),
			vmStateName(vm.GetState()), locationName(vm.GetLocation()), durationText(vm.GetDowntime()))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, vm := range view.GetVms() {
		for _, line := range remarks(vm) {
			a.printf("%s: %s\n", evacuatedName(vm), indent(line))
		}
	}
	for _, warning := range view.GetWarnings() {
		a.printf("%s\n", indent(warning))
	}
	if n := view.GetElsewhere(); n > 0 {
		a.printf("not moved: %s in containers (other namespaces), not managed by this daemon; see \"migrated vms\"\n",
			plural(uint64(n), "QEMU"))
	}
	return nil
}

// remarks returns the errors and warnings about a VM.
func remarks(vm *migratedv1.EvacuatedVM) (lines []string) {
	if e := vm.GetError(); e.GetMessage() != "" {
		lines = append(lines, e.GetMessage())
		if e.GetVmStatus() != "" {
			lines = append(lines, "where it is: "+e.GetVmStatus())
		}
		if e.GetRemedy() != "" {
			lines = append(lines, "what to do: "+e.GetRemedy())
		}
	}
	for _, warning := range vm.GetWarnings() {
		lines = append(lines, "warning: "+warning)
	}
	return lines
}

// evacuatedName returns the VM's name, or else its address.
func evacuatedName(vm *migratedv1.EvacuatedVM) string {
	return printable.Line(orText(vm.GetName(), orText(vm.GetVm(), fmt.Sprintf("process %d", vm.GetPid()))))
}

// evacuationLines shows an evacuation that is under way: first the plan, then a line for each change.
type evacuationLines struct {
	app     *app
	planned bool
	state   migratedv1.EvacuationState
	vms     map[string]string // the line that was last printed, by VM
}

// show is called with each state that the daemon sends.
func (l *evacuationLines) show(view *migratedv1.Evacuation) {
	if l.app.json {
		_ = l.app.printJSON(view) // see printMessage
		return
	}
	switch {
	case view.GetPlanTime() == nil:
		if l.state != view.GetState() {
			l.app.printf("%s: %s\n", view.GetId(), evacuationMeaning(view))
		}
	case !l.planned:
		l.planned, l.vms = true, make(map[string]string)
		l.app.printf("%s: %s\n", view.GetId(), evacuationMeaning(view))
		_ = l.app.printPlan(view) // fails if the terminal is gone
		for _, vm := range view.GetVms() {
			l.vms[vm.GetVm()] = vmLine(vm)
		}
	default:
		if l.state != view.GetState() && !evacuation.Over(view.GetState()) {
			l.app.printf("%s: %s\n", view.GetId(), evacuationMeaning(view))
		}
		for _, vm := range view.GetVms() {
			if line := vmLine(vm); l.vms[vm.GetVm()] != line {
				l.vms[vm.GetVm()] = line
				l.app.printf("%s: %s\n", evacuatedName(vm), indent(line))
			}
		}
	}
	l.state = view.GetState()
}

// vmLine describes the state of a VM, without figures.
func vmLine(vm *migratedv1.EvacuatedVM) string {
	text := vmStateName(vm.GetState())
	switch vm.GetState() {
	case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVING:
		text = fmt.Sprintf("moving to %s, migration %s", vm.GetDestination(), vm.GetMigration())
		if vm.GetMigrationState() != migratedv1.MigrationState_MIGRATION_STATE_UNSPECIFIED {
			text += ": " + migration.StateName(vm.GetMigrationState())
		}
		if vm.GetWaiting() != "" {
			text += "; it waits for its turn: " + vm.GetWaiting()
		}
	case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED:
		text = fmt.Sprintf("moved to %s, downtime %s", vm.GetDestination(), durationText(vm.GetDowntime()))
	case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING:
		if vm.GetAttempts() > 0 {
			text = fmt.Sprintf("to be tried again, at %s", vm.GetDestination())
		}
	}
	if vm.GetError().GetMessage() != "" {
		text += ": " + vm.GetError().GetMessage()
	}
	return text
}

// outcome prints the summary of an evacuation that is over, and returns its failure; nil: it has succeeded.
func (l *evacuationLines) outcome(view *migratedv1.Evacuation) error {
	if view.GetState() == migratedv1.EvacuationState_EVACUATION_STATE_FAILED {
		return &failure{exit: exitFailed, message: evacuationMeaning(view), vm: "all are here",
			remedy: view.GetError().GetRemedy()}
	}
	if !l.app.json && view.GetState() != migratedv1.EvacuationState_EVACUATION_STATE_PLANNED {
		l.app.printf("\n%s: %s\n", view.GetId(), evacuationMeaning(view))
		if err := l.app.printPlan(view); err != nil {
			return err
		}
	}
	left := 0
	for _, vm := range view.GetVms() {
		switch vm.GetState() {
		case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED, migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_ENDED:
		case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING: // in a plan: it can be moved
		default:
			left++
		}
	}
	message := fmt.Sprintf(
		"%d of %s stay on this host: see the reasons above", left, plural(uint64(len(view.GetVms())), "VM"))
	switch unknown := view.GetError(); {
	case unknown.GetMessage() != "" && left == 0:
		message = "it is not known whether VMs stay on this host: " + unknown.GetMessage()
		fallthrough
	case left > 0:
		return &failure{exit: exitStillHere, message: message, remedy: unknown.GetRemedy()}
	}
	return nil
}
