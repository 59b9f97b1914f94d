// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// domainCase is a kind of VM that users of libvirt have.
type domainCase struct {
	name       string
	version    string // of QEMU; empty: the installed one
	change     func(*lab.VMConfig)
	persistent bool
	again      bool                        // the domain is started again afterwards; it has one vCPU, see lab.Host.Boot
	run        func(*testing.T, *lab.Host) // before the first move, while the domain runs
	hugePages  int
}

var domainCases = []domainCase{
	{name: "plugged", change: func(c *lab.VMConfig) { c.Nodes = 1 }, run: plug},
	{name: "newer QEMU, plugged, nodes on a memfd, persistent", version: lab.QEMUVersions[1], persistent: true, run: plug,
		change: func(c *lab.VMConfig) { c.Nodes, c.Backend = 2, lab.BackendMemfd }},
	{name: "huge pages, UEFI", hugePages: 2 * 256 / 2, change: func(c *lab.VMConfig) {
		c.Nodes, c.HugePages, c.UEFI = 2, true, true
	}},
	{name: "shared file, paused, persistent", persistent: true, again: true,
		change: func(c *lab.VMConfig) { c.Backend = lab.BackendFile },
		run:    func(t *testing.T, h *lab.Host) { virsh(t, h, "suspend", lab.DomainName) }},
}

// plug plugs a disk, a network card, memory and a vCPU into the domain.
func plug(t *testing.T, h *lab.Host) {
	t.Helper()
	const image = lab.SharedDir + "/plugged.qcow2"
	if _, err := h.Run(testContext(t), "qemu-img", "create", "-q", "-f", "qcow2", image, "16M"); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{
		`<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='` + image + `'/>` +
			`<target dev='vdz' bus='virtio'/></disk>`,
		`<interface type='user'><mac address='52:54:00:00:00:77'/><model type='virtio'/></interface>`,
		`<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>`,
	} {
		if err := h.VirshXML(testContext(t), device, "attach-device", "--live", lab.DomainName); err != nil {
			t.Fatal(err)
		}
	}
	virsh(t, h, "setvcpus", "--live", lab.DomainName, "2")
}

// ofHost matches the parts of a domain's definition that differ between hosts: its id, and the arguments that make QEMU
// wait for a migration.
var ofHost = regexp.MustCompile(`<domain .*>|\s*<qemu:commandline>\s*<qemu:arg value='-incoming'/>\s*` +
	`<qemu:arg value='defer'/>\s*</qemu:commandline>`)

// definition returns the domain's definition as libvirt's own migration would send it, without what ofHost matches.
func definition(t *testing.T, h *lab.Host) string {
	t.Helper()
	return ofHost.ReplaceAllString(virsh(t, h, "dumpxml", "--migratable", lab.DomainName), "")
}

// TestLibvirtVMs moves domains of many kinds there and back. On each host the definition is the same, apart from the
// arguments that made QEMU wait, the guest continues to work, and no byte of its memory and its disk is wrong.
func TestLibvirtVMs(t *testing.T) {
	t.Parallel()
	for _, c := range domainCases {
		t.Run(c.name, func(t *testing.T) { moveDomain(t, c) })
	}
}

func moveDomain(t *testing.T, c domainCase) {
	if c.hugePages > 0 {
		uffdtest.ReserveHugePages(t, c.hugePages)
	}
	l := newHosts(t)
	for _, h := range l.Hosts() {
		if c.version != "" {
			useQEMU(t, h, c.version)
		}
		startDaemon(t, h)
	}
	startLibvirt(t, l)
	vm := domainVM(t)
	vm.KernelArgs = append(vm.KernelArgs, "memhp_default_state=online") // the guest uses memory that is plugged in
	if c.change != nil {
		c.change(&vm)
	}
	var guest report.Log
	port := runDomain(t, l.A, vm, c.persistent, &guest)
	if c.run != nil {
		c.run(t, l.A)
	}
	wanted, state := definition(t, l.A), virsh(t, l.A, "domstate", lab.DomainName)
	from, to := l.A, l.B
	for hop := range 2 {
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		m := completed(t, migrateSpec(t, from, fmt.Sprintf("hop-%d", hop), &migratedv1.MigrationSpec{
			Vm: lab.DomainVM, Destination: to.DaemonAddr(), Persistent: c.persistent, UndefineSource: c.persistent,
		}))
		t.Logf("downtime %v, early load %v", m.GetProgress().GetDowntime().AsDuration(), m.GetEarlyLoad())
		if diff := cmp.Diff(wanted, definition(t, to)); diff != "" {
			t.Errorf("the domain on host %s is another one than before (+):\n%s", to.Name, diff)
		}
		awaitDomain(t, to, state)
		awaitDomain(t, from, "")
		if vm.UEFI {
			sameVars(t, from, to)
		}
		port = openGuest(t, to, &guest)
		if state == "running" {
			awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
			verifyLinux(t, &guest, port)
		}
		from, to = to, from
	}
	if state != "running" {
		virsh(t, from, "resume", lab.DomainName)
		awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		verifyLinux(t, &guest, port)
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
	if c.again {
		startAgain(t, from)
	} else if info := virsh(
		t, from, "dominfo", lab.DomainName,
	); strings.Contains(info, "Persistent:     yes") != c.persistent {
		t.Errorf("the domain was persistent: %v:\n%s", c.persistent, info)
	}
}

// sameVars checks that the file with the firmware's variables is the same on both hosts, and that the firmware has
// written to it. Each host has its own file, and the destination's QEMU writes the variables that it received.
func sameVars(t *testing.T, from, to *lab.Host) {
	t.Helper()
	const path = "/var/lib/libvirt/qemu/nvram/" + lab.DomainName + "_VARS.fd"
	here, err := os.ReadFile(from.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	there, err := os.ReadFile(to.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	template, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(here, there) || bytes.Equal(here, template) {
		t.Errorf("of %d and %d bytes of the firmware's, they are the same: %v; the firmware has written none: %v",
			len(here), len(there), bytes.Equal(here, there), bytes.Equal(here, template))
	}
}

// startAgain ends the domain, and starts it from the definition that its host keeps.
func startAgain(t *testing.T, h *lab.Host) {
	t.Helper()
	virsh(t, h, "destroy", lab.DomainName)
	virsh(t, h, "start", lab.DomainName)
	var guest report.Log
	port := openGuest(t, h, &guest)
	if _, err := guest.WaitReady(testContext(t)); err != nil {
		t.Error(err)
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}
