// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/cannot"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// startLibvirt starts the libvirtd of both hosts, whose logs are shown when the test fails.
func startLibvirt(t *testing.T, l *lab.Lab, user string) {
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
		if _, err := h.StartLibvirt(testContext(t), &log, user, user); err != nil {
			t.Fatal(err)
		}
	}
}

// domainState is what virsh says of the VM on a host; empty: it has none.
func domainState(t *testing.T, h *lab.Host) string {
	t.Helper()
	state, err := h.Virsh(testContext(t), "domstate", "--reason", lab.DomainName)
	if err != nil && strings.Contains(err.Error(), "failed to get domain") {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// TestLibvirt moves a domain of libvirt's there and back: its guest works on, no byte of its memory and its disk is wrong,
// and virsh says of both hosts what is so.
func TestLibvirt(t *testing.T) {
	for _, user := range []string{"root", "libvirt-qemu"} {
		t.Run(user, func(t *testing.T) {
			l := newLab(t)
			startLibvirt(t, l, user)
			kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			vm := lab.RealVM(kernel, initrd, 256, 1, 1, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
			beforeVM(t, l.A, vm)
			if err := l.A.StartDomain(testContext(t), vm, false); err != nil {
				t.Fatal(err)
			}
			var guest report.Log
			port := openGuest(t, l.A, &guest)
			if _, err := guest.WaitReady(testContext(t)); err != nil {
				t.Fatal(err)
			}
			from, to := l.A, l.B
			for hop := range 2 {
				awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
				if err := port.Close(); err != nil {
					t.Fatal(err)
				}
				m := migrateSpec(t, from, fmt.Sprintf("hop-%d", hop), &migratedv1.MigrationSpec{
					Vm: lab.DomainVM, Destination: to.DaemonAddr(), Persistent: hop == 0,
				})
				if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
					t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
				}
				t.Logf("downtime %v, early load %v", m.GetProgress().GetDowntime().AsDuration(), m.GetEarlyLoad())
				if state := domainState(t, to); !strings.HasPrefix(state, "running") {
					t.Errorf("virsh on host %s: %q", to.Name, state)
				}
				if state := domainState(t, from); state != "" && !strings.HasPrefix(state, "shut off") {
					t.Errorf("virsh on host %s: %q", from.Name, state)
				}
				port = openGuest(t, to, &guest)
				awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
				verifyLinux(t, &guest, port)
				from, to = to, from
			}
			if err := port.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
