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

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// startLibvirt starts libvirtd on both hosts, and returns them in the order of the hosts. Their QEMUs run as the user
// of libvirt's package. settings are lines of qemu.conf. The logs are shown when the test fails.
func startLibvirt(t *testing.T, l *lab.Lab, settings ...string) (daemons []*lab.Libvirt) {
	t.Helper()
	for _, program := range []string{"libvirtd", "virsh"} {
		if _, err := exec.LookPath(program); err != nil {
			testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
		}
	}
	for _, h := range l.Hosts() {
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

// domainVM returns a VM as users of libvirt have it. It has one vCPU, so that libvirt's own migration can move it, too:
// with several vCPUs under TCG, its guest may hang afterwards. This was seen without migrated.
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

// runDomain starts the VM as a domain on a host, and returns its port when its guest works.
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

// virsh runs a command of virsh on a host, which must succeed, and returns its output.
func virsh(t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	out, err := h.Virsh(testContext(t), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// domainState returns the state of the VM in virsh on a host. It is empty if the host has no such domain.
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

// awaitDomain waits until the state of the VM in virsh on a host begins with want, or, if want is empty, until there is
// no such domain. libvirtd needs a moment to notice what happens to a QEMU.
func awaitDomain(t *testing.T, h *lab.Host, want string) {
	t.Helper()
	eventually(t, func() error {
		if state := domainState(t, h); state != want && (want == "" || !strings.HasPrefix(state, want)) {
			return fmt.Errorf("virsh on host %s says %q, not %q", h.Name, state, want)
		}
		return nil
	})
}

// moveDomainSlowly starts to move the domain, and returns when the VM runs at the destination. A limit holds most of
// its memory back until finishMove. defined: the domain is to be defined at the destination, and at the source no more.
func moveDomainSlowly(
	t *testing.T, from, to *lab.Host, id string, defined bool,
) (migratedv1.ControlServiceClient, *migratedv1.Migration) {
	t.Helper()
	client := control(t, from)
	spec := &migratedv1.MigrationSpec{
		Vm: lab.DomainVM, Destination: to.DaemonAddr(), Bandwidth: 1 << 20,
		Persistent: defined, UndefineSource: defined,
	}
	start(t, client, id, spec)
	m := await(t, client, id, func(m *migratedv1.Migration) bool {
		return m.GetLocation() == migratedv1.Location_LOCATION_DESTINATION
	})
	if migration.Terminal(m.GetState()) {
		t.Fatalf("it is %v: %v", m.GetState(), m.GetError())
	}
	return client, m
}

// finishMove lifts the limit, and waits until all memory has arrived.
func finishMove(t *testing.T, client migratedv1.ControlServiceClient, id string) {
	t.Helper()
	unlimit(t, client, id)
	completed(t, awaitEnd(t, client, id))
}

// checkGuestAt waits until the guest works on a host, and has it check its memory and its disk. The caller closes the
// port.
func checkGuestAt(t *testing.T, h *lab.Host, guest *report.Log) *report.Port {
	t.Helper()
	port := openGuest(t, h, guest)
	awaitBlocks(t, guest, writesOf(guest.Disks())+50)
	verifyLinux(t, guest, port)
	return port
}

// TestLibvirt moves a libvirt domain there and back. Its guest continues to work, no byte of its memory and its disk is
// wrong, and virsh shows the right state on both hosts.
func TestLibvirt(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	startLibvirt(t, l, lab.OwnCgroups)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	confinedByLibvirt(t, l.A)
	checkCancelled(t, l)
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
		var m *migratedv1.Migration
		if hop == 0 {
			m = migrateSpec(t, from, "hop-0", &migratedv1.MigrationSpec{
				Vm: lab.DomainVM, Destination: to.DaemonAddr(), Persistent: true,
			})
		} else {
			m = evacuateDomain(t, from, to, "hop")
		}
		completed(t, m)
		t.Logf("downtime %v, early load %v", m.GetProgress().GetDowntime().AsDuration(), m.GetEarlyLoad())
		awaitDomain(t, to, "running")
		awaitDomain(t, from, "")
		if hop == 0 {
			kept, err := to.Virsh(testContext(t), "dumpxml", "--inactive", lab.DomainName)
			if err != nil || !strings.Contains(kept, "guest-disk0.qcow2") || strings.Contains(kept, "incoming") {
				t.Errorf("%v; host %s has kept\n%s", err, to.Name, kept)
			}
		}
		if hop == 0 {
			events[from].expect(t, "(Suspended Resumed )+Suspended Shutdown Stopped") // early states, then the switch
			events[to].expect(t, "Started Suspended Resumed Defined")
		}
		port = checkGuestAt(t, to, &guest)
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// events is the output of "virsh event" on a host.
type events struct {
	host *lab.Host
	log  string
}

// probe is a domain that is defined only for the event of that. Its emulator is that of the other domains, whose
// capabilities libvirt knows.
const probe = `<domain type='qemu'>
  <name>probe</name>
  <uuid>00000000-0000-4000-8000-0000000000ff</uuid>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
</domain>
`

// watchEvents starts "virsh event" on a host, and returns when it receives events. virsh does not say when it is
// registered for them, but from then on it reports that a domain was defined.
func watchEvents(t *testing.T, h *lab.Host) *events {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "events-"+h.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // virsh has its own descriptor
	// Buffered by line: output that virsh has not written when it is killed is lost.
	if _, err := h.Start(log, "stdbuf", "-oL", "virsh", "event", "--event", "lifecycle", "--loop"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := h.VirshXML(testContext(t), probe, "define"); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(log.Name())
		if err == nil && !strings.Contains(string(text), "event 'lifecycle' for domain 'probe'") {
			err = fmt.Errorf("virsh event on host %s does not tell of a definition: %q", h.Name, text)
		}
		return err
	})
	virsh(t, h, "undefine", "probe")
	return &events{host: h, log: log.Name()}
}

// expect waits until the kinds of the VM's events, such as "Started Suspended", match a regular expression as a whole.
func (e *events) expect(t *testing.T, want string) {
	t.Helper()
	expression := regexp.MustCompile("^" + want + "$")
	eventually(t, func() error {
		text, _ := os.ReadFile(e.log)
		var kinds []string
		for line := range strings.Lines(string(text)) {
			if _, event, found := strings.Cut(line, "event 'lifecycle' for domain '"+lab.DomainName+"': "); found {
				kinds = append(kinds, strings.Fields(event)[0])
			}
		}
		if !expression.MatchString(strings.Join(kinds, " ")) {
			return fmt.Errorf("virsh event on host %s tells of %q, not of %q:\n%s", e.host.Name, kinds, want, text)
		}
		return nil
	})
}

// confinedByLibvirt checks that libvirt has confined the domain's QEMU on a host: it runs as another user without
// capabilities, in a mount namespace of its own, with a filter of system calls. Its control groups are only logged,
// because not every machine has them.
func confinedByLibvirt(t *testing.T, h *lab.Host) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", qemuOn(t, h))
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

// checkCancelled prepares a migration of the domain and cancels it. The domain then runs at the source, and the
// destination has none.
func checkCancelled(t *testing.T, l *lab.Lab) {
	t.Helper()
	client := control(t, l.A)
	spec := &migratedv1.MigrationSpec{Vm: lab.DomainVM, Destination: l.B.DaemonAddr()}
	prepare(t, client, "in-vain", spec)
	awaitDomain(t, l.B, "paused")
	cancel(t, client, "in-vain")
	awaitEnd(t, client, "in-vain")
	awaitDomain(t, l.A, "running")
	awaitDomain(t, l.B, "")
}

// TestLibvirtRestarts: the libvirtds of both hosts are killed while the VM's memory is arriving, and started again. The
// migration completes, and virsh shows the right state on both hosts.
func TestLibvirtRestarts(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	daemons := startLibvirt(t, l)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	client, _ := moveDomainSlowly(t, l.A, l.B, "restarts", false)
	for _, d := range daemons {
		if err := errors.Join(d.Kill(), d.Restart(testContext(t))); err != nil {
			t.Fatal(err)
		}
	}
	finishMove(t, client, "restarts")
	awaitDomain(t, l.B, "running")
	awaitDomain(t, l.A, "")
	if err := checkGuestAt(t, l.B, &guest).Close(); err != nil {
		t.Error(err)
	}
}

// TestLibvirtDestroyed uses virsh while the memory of a domain without disks is arriving. Resuming it at the source
// fails. Destroying it at the destination is no failure: the source reports that the VM has ended. The destination has
// no domain any more, as it was to be defined there with the last page. The source keeps its definition, and says so.
func TestLibvirtDestroyed(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	startLibvirt(t, l)
	vm := domainVM(t)
	vm.Disks = 0 // so that no lock of an image prevents the resume
	var guest report.Log
	if err := runDomain(t, l.A, vm, true, &guest).Close(); err != nil {
		t.Fatal(err)
	}
	client, _ := moveDomainSlowly(t, l.A, l.B, "destroyed", true)
	for range 2 {
		if out, err := l.A.Virsh(testContext(t), "resume", lab.DomainName); err == nil {
			t.Errorf("the VM was resumed at the source: %q", out)
		}
	}
	awaitDomain(t, l.A, "paused")
	virsh(t, l.B, "destroy", lab.DomainName)
	m := awaitEnd(t, client, "destroyed")
	if m.GetState() != stateEnded || !strings.Contains(m.GetDefinition(), "virsh undefine "+lab.DomainName) {
		t.Errorf("it is %v: %v; the definition %q", m.GetState(), m.GetError(), m.GetDefinition())
	}
	awaitDomain(t, l.A, "shut off")
	awaitDomain(t, l.B, "")
}

// evacuateDomain evacuates a host whose only VM is a domain, with --undefine-source, and returns the migration of the
// domain.
func evacuateDomain(t *testing.T, from, to *lab.Host, id string) *migratedv1.Migration {
	t.Helper()
	if out, code := operate(t, from, "vms"); code != 0 || !strings.Contains(out, lab.DomainVM+" ") {
		t.Errorf("vms: exit code %d:\n%s", code, out)
	}
	out, code := operate(t, from, "evacuate", "--to", to.DaemonAddr(), "--undefine-source", "--id", id)
	if code != 0 {
		t.Errorf("evacuate: exit code %d:\n%s", code, out)
	}
	return get(t, from, id+"-1-1")
}
