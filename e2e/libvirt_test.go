// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// startLibvirt starts the libvirtd of both hosts, whose QEMUs run as its package has it. Their logs are shown when the
// test fails.
func startLibvirt(t *testing.T, l *lab.Lab, settings ...string) (daemons []*lab.Libvirt) {
	t.Helper()
	for _, program := range []string{"libvirtd", "virsh"} {
		if _, err := exec.LookPath(program); err != nil {
			cannot.Run(t, "%v: install the packages of scripts/setup", err)
		}
	}
	for _, h := range []*lab.Host{l.A, l.B} {
		var log bytes.Buffer
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("libvirtd of host %s:\n%s", h.Name, &log)
			}
		})
		daemon, err := h.StartLibvirt(testContext(t), &log, settings...)
		if err != nil {
			t.Fatal(err)
		}
		daemons = append(daemons, daemon)
	}
	return daemons
}

// domainVM is a VM as a user of libvirt has it, with one vCPU, that libvirt's own migration moves as well: with several
// its guest may stand still afterwards under TCG, seen without any of ours.
func domainVM(t *testing.T) lab.VMConfig {
	t.Helper()
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	vm := lab.RealVM(kernel, initrd, 256, 1, 1, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
	vm.VCPUs = 1
	return vm
}

// runDomain starts the VM on a host, and returns its port when its guest is at work.
func runDomain(t *testing.T, h *lab.Host, vm lab.VMConfig, persistent bool, guest *report.Log) *report.Port {
	t.Helper()
	beforeVM(t, h, vm)
	start := h.StartDomain
	if persistent {
		start = h.DefineDomain
	}
	if err := start(testContext(t), vm); err != nil {
		t.Fatal(err)
	}
	if persistent {
		virsh(t, h, "start", lab.DomainName)
	}
	port := openGuest(t, h, guest)
	if _, err := guest.WaitReady(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return port
}

// virsh runs a command of virsh's that has to succeed.
func virsh(t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	out, err := h.Virsh(testContext(t), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// domainState is what virsh says of the VM on a host; empty: it has none.
func domainState(t *testing.T, h *lab.Host) string {
	t.Helper()
	state, err := h.Virsh(testContext(t), "domstate", "--reason", lab.DomainName)
	if lab.IsNoDomain(err) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// awaitDomain waits until virsh says of the VM on a host what begins so; empty: nothing. libvirtd needs a moment to
// notice what happens to a QEMU.
func awaitDomain(t *testing.T, h *lab.Host, want string) {
	t.Helper()
	var state string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if state = domainState(t, h); state == want || want != "" && strings.HasPrefix(state, want) {
			return
		}
	}
	t.Errorf("virsh on host %s says %q, not %q", h.Name, state, want)
}

// crossing begins to move the domain, and returns when the VM runs at the destination and its memory crosses, slowly.
func crossing(t *testing.T, from, to *lab.Host, id string) (migratedv1.ControlServiceClient, *migratedv1.Migration) {
	t.Helper()
	client := control(t, from)
	spec := &migratedv1.MigrationSpec{Vm: lab.DomainVM, Destination: to.DaemonAddr(), Bandwidth: 1 << 20}
	if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	m := await(t, client, id, func(m *migratedv1.Migration) bool {
		return m.GetLocation() == migratedv1.Location_LOCATION_DESTINATION
	})
	if migration.Terminal(m.GetState()) {
		t.Fatalf("it is %v: %v", m.GetState(), m.GetError())
	}
	return client, m
}

// cross lets memory that crosses slowly cross at once, and wants all of it to arrive.
func cross(t *testing.T, client migratedv1.ControlServiceClient, id string) {
	t.Helper()
	if _, err := client.SetBandwidth(testContext(t), &migratedv1.SetBandwidthRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	m := await(t, client, id, func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("it is %v: %v", m.GetState(), m.GetError())
	}
}

// worksAt wants the guest to work on a host, and to find its memory and its disk whole. The port is the caller's.
func worksAt(t *testing.T, h *lab.Host, guest *report.Log) *report.Port {
	t.Helper()
	port := openGuest(t, h, guest)
	awaitBlocks(t, guest, writesOf(guest.Disks())+50)
	verifyLinux(t, guest, port)
	return port
}

// TestLibvirt moves a domain of libvirt's there and back: its guest works on, no byte of its memory and its disk is
// wrong, and virsh says of both hosts what is so.
func TestLibvirt(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	startLibvirt(t, l, lab.OwnCgroups)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	confinedByLibvirt(t, l.A)
	cancelled(t, l)
	out, code := operate(t, l.A, "check", "--vm", lab.DomainVM, "--to", l.B.DaemonAddr())
	if code != 0 || !strings.Contains(out, "domains that run here: "+lab.DomainName) {
		t.Errorf("check: exit code %d:\n%s", code, out)
	}
	from, to := l.A, l.B
	events := map[*lab.Host]*events{from: watchEvents(t, from), to: watchEvents(t, to)}
	for hop := range 2 {
		awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		m := migrateSpec(t, from, fmt.Sprintf("hop-%d", hop), &migratedv1.MigrationSpec{
			Vm: lab.DomainVM, Destination: to.DaemonAddr(), Persistent: hop == 0, UndefineSource: hop == 1,
		})
		if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
			t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
		}
		t.Logf("downtime %v, early load %v", m.GetProgress().GetDowntime().AsDuration(), m.GetEarlyLoad())
		if state := domainState(t, to); !strings.HasPrefix(state, "running") {
			t.Errorf("virsh on host %s: %q", to.Name, state)
		}
		if state := domainState(t, from); state != "" {
			t.Errorf("virsh on host %s: %q", from.Name, state)
		}
		if hop == 0 {
			kept, err := to.Virsh(testContext(t), "dumpxml", "--inactive", lab.DomainName)
			if err != nil || !strings.Contains(kept, "guest-disk0.qcow2") || strings.Contains(kept, "incoming") {
				t.Errorf("%v; host %s has kept\n%s", err, to.Name, kept)
			}
		}
		if hop == 0 {
			events[from].expect(t, "(Suspended Resumed )+Suspended Shutdown Stopped") // early states, and the switch
			events[to].expect(t, "Started Suspended Resumed Defined")
		}
		port = worksAt(t, to, &guest)
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// events are what "virsh event" tells on a host.
type events struct {
	host *lab.Host
	log  string
}

func watchEvents(t *testing.T, h *lab.Host) *events {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "events-"+h.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // virsh has its own
	// Lines as they come: what virsh still has when it is killed is lost.
	if _, err := h.Start(log, "stdbuf", "-oL", "virsh", "event", "--event", "lifecycle", "--loop"); err != nil {
		t.Fatal(err)
	}
	return &events{host: h, log: log.Name()}
}

// expect waits until the kinds of events of the VM of which virsh has told match an expression.
func (e *events) expect(t *testing.T, want string) {
	t.Helper()
	expression := regexp.MustCompile("^" + want + "$")
	var kinds []string
	var text []byte
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		text, _ = os.ReadFile(e.log)
		kinds = nil
		for line := range strings.Lines(string(text)) {
			if _, event, found := strings.Cut(line, "event 'lifecycle' for domain '"+lab.DomainName+"': "); found {
				kinds = append(kinds, strings.Fields(event)[0])
			}
		}
		if expression.MatchString(strings.Join(kinds, " ")) {
			return
		}
	}
	t.Errorf("virsh event on host %s tells of %q, not of %q:\n%s", e.host.Name, kinds, want, text)
}

// confinedByLibvirt wants the domain's QEMU on a host to be what libvirt makes of one: another user's, in a mount
// namespace of its own, with a filter of system calls and, where the machine has them, in a control group of its own.
func confinedByLibvirt(t *testing.T, h *lab.Host) {
	t.Helper()
	pids, err := h.Processes("qemu-system-x86_64")
	if err != nil || len(pids) != 1 {
		t.Fatalf("QEMUs of host %s: %v, %v", h.Name, pids, err)
	}
	proc := fmt.Sprintf("/proc/%d/", pids[0])
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t64055\t64055\t64055\t64055\n", "CapEff:\t0000000000000000\n", "Seccomp:\t2\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("QEMU has no %q:\n%s", want, status)
		}
	}
	its, err := os.Readlink(proc + "ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	if host, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", h.PID())); err != nil || host == its {
		t.Errorf("QEMU's mount namespace is %s, %v, its host's %s", its, err, host)
	}
	groups, err := os.ReadFile(proc + "cgroup")
	t.Logf("its control groups, %v:\n%s", err, groups)
}

// cancelled prepares a migration of the domain, and cancels it: nothing has changed.
func cancelled(t *testing.T, l *lab.Lab) {
	t.Helper()
	client := control(t, l.A)
	spec := &migratedv1.MigrationSpec{Vm: lab.DomainVM, Destination: l.B.DaemonAddr()}
	if _, err := client.Prepare(testContext(t), &migratedv1.PrepareRequest{Id: "in-vain", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	m := await(t, client, "in-vain", func(m *migratedv1.Migration) bool { return m.GetPrepared() })
	if state := domainState(t, l.B); !m.GetPrepared() || !strings.HasPrefix(state, "paused") {
		t.Errorf("prepared: %v, %v; virsh on host b: %q", m.GetState(), m.GetError(), state)
	}
	if _, err := client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: "in-vain"}); err != nil {
		t.Fatal(err)
	}
	await(t, client, "in-vain", func(*migratedv1.Migration) bool { return false })
	if here, there := domainState(t, l.A), domainState(t, l.B); !strings.HasPrefix(here, "running") || there != "" {
		t.Errorf("virsh says %q on host a and %q on host b", here, there)
	}
}

// TestLibvirtRestarts: the libvirtds of both hosts are killed while the VM's memory crosses, and started again. The
// migration completes, and virsh tells the truth.
func TestLibvirtRestarts(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	daemons := startLibvirt(t, l)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	client, _ := crossing(t, l.A, l.B, "restarts")
	for _, d := range daemons {
		if err := errors.Join(d.Kill(), d.Restart(testContext(t))); err != nil {
			t.Fatal(err)
		}
	}
	cross(t, client, "restarts")
	if there := domainState(t, l.B); !strings.HasPrefix(there, "running") {
		t.Errorf("virsh on host b: %q", there)
	}
	awaitDomain(t, l.A, "")
	if err := worksAt(t, l.B, &guest).Close(); err != nil {
		t.Error(err)
	}
}

// TestLibvirtDestroyed: while the memory of a domain without disks crosses, virsh resumes it in vain at the source, and
// ends it at the destination. That is no failure: both hosts say that the VM has ended, and nothing is left of it at the
// source.
func TestLibvirtDestroyed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	startLibvirt(t, l)
	vm := domainVM(t)
	vm.Disks = 0 // no lock of an image
	var guest report.Log
	if err := runDomain(t, l.A, vm, false, &guest).Close(); err != nil {
		t.Fatal(err)
	}
	client, _ := crossing(t, l.A, l.B, "destroyed")
	for range 2 {
		if out, err := l.A.Virsh(testContext(t), "resume", lab.DomainName); err == nil {
			t.Errorf("the VM was resumed at the source: %q", out)
		}
	}
	awaitDomain(t, l.A, "paused")
	virsh(t, l.B, "destroy", lab.DomainName)
	m := await(t, client, "destroyed", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_ENDED {
		t.Errorf("it is %v: %v", m.GetState(), m.GetError())
	}
	awaitDomain(t, l.A, "")
	awaitDomain(t, l.B, "")
}
