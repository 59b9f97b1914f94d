// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	evacuatedVMs = 12
	// evacuationPatience limits how long a test waits for the evacuation of all VMs.
	evacuationPatience = 3 * patience
)

// TestEvacuate evacuates a host with twelve VMs to two others. One of the VMs cannot be moved. In the middle, the cable
// is pulled for a while, and later the daemon is killed and started again. Every VM is where the summary says and
// nowhere else, and its memory is right.
func TestEvacuate(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	l := newHosts(t)
	d, err := l.AddHost(ctx)
	if err != nil {
		t.Fatal(err)
	}
	hosts := map[string]*lab.Host{l.A.DaemonAddr(): l.A, l.B.DaemonAddr(): l.B, d.DaemonAddr(): d}
	for _, h := range []*lab.Host{l.B, d} {
		startDaemon(t, h)
	}
	daemon := startDaemon(t, l.A, "--host-bandwidth", "60M")
	var names []string
	for i := range evacuatedVMs - 1 {
		names = append(names, fmt.Sprintf("vm%02d", i+1))
	}
	vms := startSmall(t, l, append(names, blocked)...)

	plan := evacuate(t, l.A, 9, "--to", l.B.Addr, "--to", d.Addr, "--plan", "--apart", "vm01,vm02")
	if n := countVMs(plan, migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING); n != evacuatedVMs-1 {
		t.Errorf("the plan has %d VMs to move: %v", n, plan)
	}
	left := evacuatedVM(t, plan, blocked)
	if left.GetState() != migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE ||
		!strings.Contains(left.GetError().GetMessage(), "nvme") {
		t.Errorf("the plan says of the VM that cannot be moved: %v", left)
	}
	for _, vm := range vms {
		for _, h := range []*lab.Host{l.B, d} {
			if !vm.leaves(ctx, h) {
				t.Errorf("a plan leaves a QEMU of %s at host %s", vm.name, h.Name)
			}
		}
	}

	began := time.Now()
	watching := startEvacuation(t, l.A, "--to", l.B.Addr+","+d.Addr, "--id", "e1",
		"--at-once", "3", "--apart", "vm01,vm02", "--weight", "vm03=4")
	service := evacuations(t, l.A)
	awaitEvacuation(t, service, "e1", func(e *migratedv1.Evacuation) bool {
		return countVMs(e, migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED) >= 2
	})
	if err := l.SetCable(testContext(t), false); err != nil {
		t.Fatal(err)
	}
	// The cable interrupts a migration, or one fails and is to be tried again. VMs on their way to the other host are
	// not affected.
	awaitEvacuation(t, service, "e1", func(e *migratedv1.Evacuation) bool {
		return slices.ContainsFunc(e.GetVms(), func(vm *migratedv1.EvacuatedVM) bool {
			again := vm.GetState() == migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING && vm.GetAttempts() > 0
			return vm.GetMigrationState() == statePaused || again || vm.GetAttempts() > 1
		})
	})
	if err := l.SetCable(testContext(t), true); err != nil {
		t.Fatal(err)
	}
	awaitEvacuation(t, service, "e1", func(e *migratedv1.Evacuation) bool {
		return countVMs(e, migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED) >= 6
	})
	if err := daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.A, "--host-bandwidth", "60M")
	summary, code := watching()
	t.Logf("evacuated in %v", time.Since(began))
	if code != 9 {
		t.Errorf("exit code %d, with one VM that cannot be moved:\n%v", code, summary)
	}
	checkSummary(t, l.A, hosts, summary, vms)
	one, two := evacuatedVM(t, summary, "vm01"), evacuatedVM(t, summary, "vm02")
	if one.GetDestination() == two.GetDestination() {
		t.Errorf("vm01 and vm02, which are to be apart, are both at %s", one.GetDestination())
	}
	destinations := make(map[string]int)
	for _, vm := range summary.GetVms() {
		if vm.GetState() == migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED {
			destinations[vm.GetDestination()]++
		}
	}
	if destinations[l.B.DaemonAddr()] == 0 || destinations[d.DaemonAddr()] == 0 {
		t.Errorf("VMs that were moved, by destination: %v", destinations)
	}
}

// checkSummary compares the summary of an evacuation with the QEMUs on each host, and checks the VMs' memory.
func checkSummary(
	t *testing.T, from *lab.Host, hosts map[string]*lab.Host, summary *migratedv1.Evacuation, vms []smallVM,
) {
	t.Helper()
	ctx := testContext(t)
	if len(summary.GetVms()) != len(vms) {
		t.Errorf("the summary has %d VMs, of %d", len(summary.GetVms()), len(vms))
	}
	for _, vm := range vms {
		said := evacuatedVM(t, summary, vm.name)
		at := from
		switch said.GetState() {
		case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED:
			at = hosts[said.GetDestination()]
		case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE:
			if vm.name != blocked {
				t.Errorf("%s was not moved: %v", vm.name, said)
			}
		default:
			t.Errorf("%s: %v", vm.name, said)
			continue
		}
		for _, h := range hosts {
			if h == at {
				vm.verify(t, h)
			} else if !vm.leaves(ctx, h) {
				t.Errorf("%s is said to be at host %s, and host %s has a QEMU of it, too", vm.name, at.Name, h.Name)
			}
		}
	}
}

func countVMs(e *migratedv1.Evacuation, state migratedv1.EvacuatedVMState) (n int) {
	for _, vm := range e.GetVms() {
		if vm.GetState() == state {
			n++
		}
	}
	return n
}

func evacuatedVM(t *testing.T, e *migratedv1.Evacuation, name string) *migratedv1.EvacuatedVM {
	t.Helper()
	for _, vm := range e.GetVms() {
		if vm.GetName() == name {
			return vm
		}
	}
	t.Fatalf("the evacuation has no VM %s: %v", name, e)
	return nil
}

func evacuations(t *testing.T, h *lab.Host) migratedv1.EvacuationServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+h.Path(lab.DaemonSocket),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeConn(t, conn) })
	return migratedv1.NewEvacuationServiceClient(conn)
}

// awaitEvacuation waits until wanted accepts the evacuation.
func awaitEvacuation(
	t *testing.T, service migratedv1.EvacuationServiceClient, id string, wanted func(*migratedv1.Evacuation) bool,
) {
	t.Helper()
	ctx := testContext(t)
	eventually(t, func() error {
		answer, err := service.GetEvacuation(ctx, &migratedv1.GetEvacuationRequest{Id: id})
		if err == nil && !wanted(answer.GetEvacuation()) {
			err = fmt.Errorf("the evacuation does not get on: %v", answer)
		}
		return err
	})
}

// startEvacuation starts "migrated evacuate" as an operator does. wait waits for its end, and returns the evacuation as
// printed last and the exit code.
func startEvacuation(t *testing.T, h *lab.Host, args ...string) (wait func() (*migratedv1.Evacuation, int)) {
	t.Helper()
	binary, err := lab.Binary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), evacuationPatience)
	t.Cleanup(cancel)
	cmd := h.Command(ctx, append([]string{binary, "--json", "evacuate"}, args...)...)
	var out, failed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &failed
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() (*migratedv1.Evacuation, int) {
		t.Helper()
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		var last json.RawMessage
		for decoder := json.NewDecoder(&out); decoder.More(); {
			if err := decoder.Decode(&last); err != nil {
				t.Fatalf("%v: %s", err, failed.String())
			}
		}
		view := &migratedv1.Evacuation{}
		if err := protojson.Unmarshal(last, view); err != nil {
			t.Fatalf("%v: %s", err, failed.String())
		}
		return view, cmd.ProcessState.ExitCode()
	}
}

// evacuate runs "migrated evacuate" to its end, and checks its exit code.
func evacuate(t *testing.T, h *lab.Host, code int, args ...string) *migratedv1.Evacuation {
	t.Helper()
	view, got := startEvacuation(t, h, args...)()
	if got != code {
		t.Errorf("migrated evacuate %s: exit code %d, not %d: %v", strings.Join(args, " "), got, code, view)
	}
	return view
}

// TestQueue checks that a migration waits while the destination has no place for it. A migration that must not wait is
// refused, and one whose queue_limit passes fails.
func TestQueue(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A, "--max-outgoing", "2")
	startDaemon(t, l.B, "--max-incoming", "2") // one source may have half of them
	vms := startSmall(t, l, "one", "two")
	client := control(t, l.A)
	move := func(id string, vm smallVM, spec *migratedv1.MigrationSpec) {
		t.Helper()
		spec.Vm, spec.Destination = vm.qmp(), l.B.DaemonAddr()
		start(t, client, id, spec)
	}
	move("first", vms[0], &migratedv1.MigrationSpec{Bandwidth: 64 << 10}) // the sweep takes a quarter of an hour
	await(t, client, "first", (*migratedv1.Migration).GetPrepared)
	move("refused", vms[1], &migratedv1.MigrationSpec{QueueLimit: durationpb.New(0)})
	refused := awaitEnd(t, client, "refused")
	if refused.GetState() != stateFailed ||
		!strings.Contains(refused.GetError().GetMessage(), "half of what it allows") {
		t.Errorf("one that is not to wait: %v", refused)
	}
	move("short", vms[1], &migratedv1.MigrationSpec{QueueLimit: durationpb.New(time.Second)})
	short := awaitEnd(t, client, "short")
	if short.GetError().GetReason() != migratedv1.Reason_REASON_NO_TURN {
		t.Errorf("one that is to wait a second: %v", short)
	}
	move("second", vms[1], &migratedv1.MigrationSpec{})
	waits := await(t, client, "second", func(m *migratedv1.Migration) bool { return m.GetWaiting() != "" })
	if !strings.Contains(waits.GetWaiting(), "max_incoming") {
		t.Errorf("the second waits for %q", waits.GetWaiting())
	}
	unlimit(t, client, "first")
	for _, id := range []string{"first", "second"} {
		if m := awaitEnd(t, client, id); m.GetState() != stateCompleted {
			t.Errorf("%s: %v", id, m)
		}
	}
	for _, vm := range vms {
		vm.verify(t, l.B)
	}
}
