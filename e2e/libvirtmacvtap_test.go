// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestLibvirtMacvtap moves a domain whose network card is a macvtap device. libvirt makes that device down, and brings
// it up when it continues the domain itself. The client reaches the guest at the destination.
func TestLibvirtMacvtap(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	startLibvirt(t, l)
	vm := domainVM(t)
	vm.Macvtap = true
	var guest report.Log
	if err := runDomain(t, l.A, vm, false, &guest).Close(); err != nil {
		t.Fatal(err)
	}
	pinger, err := l.Ping(vm, 0, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if err := pinger.Await(testContext(t), time.Time{}); err != nil {
		t.Fatalf("before the move: %v", err)
	}
	completed(t, migrateSpec(t, l.A, "macvtap", &migratedv1.MigrationSpec{
		Vm: lab.DomainVM, Destination: l.B.DaemonAddr(),
	}))
	awaitDomain(t, l.B, "running")
	out, err := l.B.Run(testContext(t), "ip", "-o", "link", "show", "type", "macvtap")
	if err != nil || !strings.Contains(out, ",UP") {
		t.Fatalf("the macvtap device at the destination, %v: %q", err, out)
	}
	if err := pinger.Await(testContext(t), time.Now()); err != nil {
		t.Errorf("after the move: %v", err)
	}
	if _, err := pinger.Stop(); err != nil {
		t.Error(err)
	}
	if err := checkGuestAt(t, l.B, &guest).Close(); err != nil {
		t.Error(err)
	}
}
