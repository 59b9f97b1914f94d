// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// domainFailure is a failure that prevents the migration of a domain.
type domainFailure struct {
	name string
	// before happens before the migration, prepared when the destination is ready, and after at its end.
	before, prepared, after func(*domainStage)
	words                   string // in the error, whichever host notices first
}

// domainStage is two hosts with libvirt and migrated. Host a runs the domain.
type domainStage struct {
	*testing.T
	*lab.Lab
	libvirts []*lab.Libvirt
	daemonB  *lab.Process
}

var domainFailures = []domainFailure{
	{
		name:   "no libvirt at the destination",
		before: func(s *domainStage) { s.must(s.libvirts[1].Kill()) },
		after:  func(s *domainStage) { s.must(s.libvirts[1].Restart(testContext(s.T))) },
		words:  "no libvirt daemon answers on this host; start libvirtd or virtqemud",
	},
	{
		name: "another domain of its name, which stays", words: "virsh destroy " + lab.DomainName,
		before: func(s *domainStage) {
			s.must(s.B.VirshXML(testContext(s.T), `<domain type='qemu'><name>`+lab.DomainName+
				`</name><memory unit='MiB'>32</memory><os><type>hvm</type></os></domain>`, "create"))
		},
		after: func(s *domainStage) {
			awaitDomain(s.T, s.B, "running")
			virsh(s.T, s.B, "destroy", lab.DomainName)
		},
	},
	{
		name: "no such image there", words: "/run/vm/local.img",
		before: func(s *domainStage) {
			const path = lab.VMDir + "/local.img"
			s.must(os.WriteFile(s.A.Path(path), make([]byte, 1<<20), 0o666))
			s.must(s.A.VirshXML(testContext(s.T), `<disk type='file' device='disk'><driver name='qemu' type='raw'/>`+
				`<source file='`+path+`'/><target dev='vdz' bus='virtio'/></disk>`, "attach-device", "--live", lab.DomainName))
		},
		after: func(s *domainStage) { virsh(s.T, s.A, "detach-disk", "--live", lab.DomainName, "vdz") },
	},
	{
		name: "destroyed while it waits", words: "the destination QEMU",
		prepared: func(s *domainStage) { virsh(s.T, s.B, "destroy", lab.DomainName) },
	},
	{
		name: "its QEMU is killed while it waits", words: "QEMU exited or was killed",
		prepared: func(s *domainStage) { kill(s.T, qemuOn(s.T, s.B), syscall.SIGKILL) },
	},
	{
		name: "the daemon is killed while it waits", words: "cannot be reached",
		prepared: func(s *domainStage) { s.must(s.daemonB.Kill()) },
		after:    func(s *domainStage) { startDaemon(s.T, s.B) },
	},
	{
		name: "libvirt is killed there while it waits", words: "libvirt's daemon or QEMU exited",
		prepared: func(s *domainStage) { s.must(s.libvirts[1].Kill()) },
		after:    func(s *domainStage) { s.must(s.libvirts[1].Restart(testContext(s.T))) },
	},
	{
		name: "libvirt is killed here while it waits", words: "libvirt's daemon or QEMU exited",
		prepared: func(s *domainStage) { s.must(s.libvirts[0].Kill()) },
		after:    func(s *domainStage) { s.must(s.libvirts[0].Restart(testContext(s.T))) },
	},
}

func (s *domainStage) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// TestLibvirtFailures checks that after each failure before the switch the domain still runs at the source, according
// to virsh and to its guest, which writes to its disk. The destination has no such domain.
func TestLibvirtFailures(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	s := &domainStage{T: t, Lab: l, daemonB: startDaemon(t, l.B), libvirts: startLibvirt(t, l)}
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	for i, f := range domainFailures {
		t.Run(f.name, func(t *testing.T) {
			s.T = t
			if f.before != nil {
				f.before(s)
			}
			m := s.fail(fmt.Sprintf("failure-%d", i), f.prepared)
			t.Logf("%v: %v", m.GetState(), m.GetError())
			if m.GetState() != stateFailed ||
				m.GetLocation() != migratedv1.Location_LOCATION_SOURCE ||
				!strings.Contains(fmt.Sprint(m.GetError()), f.words) {
				t.Errorf("it is %v, at %v: %v", m.GetState(), m.GetLocation(), m.GetError())
			}
			if f.after != nil {
				f.after(s)
			}
			awaitDomain(t, l.A, "running")
			awaitDomain(t, l.B, "")
			awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		})
	}
	s.T = t
	s.refusesToLoseSnapshots()
	verifyLinux(t, &guest, port)
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// refusesToLoseSnapshots checks that a domain with a snapshot is not moved with --undefine-source, which would lose
// what libvirt knows of the snapshot.
func (s *domainStage) refusesToLoseSnapshots() {
	s.Helper()
	s.must(s.A.VirshXML(testContext(s.T), `<domainsnapshot><name>kept</name><state>shutoff</state>`+
		`<creationTime>1</creationTime>`+virsh(s.T, s.A, "dumpxml", "--inactive", lab.DomainName)+`</domainsnapshot>`,
		"snapshot-create", "--redefine", lab.DomainName))
	m := migrateSpec(s.T, s.A, "snapshot", &migratedv1.MigrationSpec{
		Vm: lab.DomainVM, Destination: s.B.DaemonAddr(), Persistent: true, UndefineSource: true,
	})
	if m.GetState() != stateFailed || !strings.Contains(fmt.Sprint(m.GetError()), "lose the domain's 1 snapshots") {
		s.Errorf("with a snapshot it is %v: %v", m.GetState(), m.GetError())
	}
	out, _ := operate(s.T, s.A, "check", "--vm", lab.DomainVM)
	if !strings.Contains(out, "1 snapshots and 0 checkpoints") {
		s.Errorf("check does not warn of the snapshot:\n%s", out)
	}
	virsh(s.T, s.A, "snapshot-delete", "--metadata", lab.DomainName, "kept")
}

// fail starts a migration of the domain that must fail, or prepares it and calls prepared, and returns it.
func (s *domainStage) fail(id string, prepared func(*domainStage)) *migratedv1.Migration {
	s.Helper()
	client := control(s.T, s.A)
	spec := &migratedv1.MigrationSpec{Vm: lab.DomainVM, Destination: s.B.DaemonAddr()}
	if prepared == nil {
		return migrateSpec(s.T, s.A, id, spec)
	}
	prepare(s.T, client, id, spec)
	prepared(s)
	return awaitEnd(s.T, client, id)
}
