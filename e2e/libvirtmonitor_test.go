// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"syscall"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// TestLibvirtOutlivesMonitors connects to a domain's QEMU again and again, and libvirtd survives it. libvirtd 9.0 may
// crash if a client deregisters from events while its connection ends (see internal/libvirt).
func TestLibvirtOutlivesMonitors(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startLibvirt(t, l)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	address := libvirt.Address(l.A.Path(lab.LibvirtSocket), lab.DomainName)
	for range 1000 {
		vm, err := qemu.Attach(testContext(t), address)
		if err != nil {
			t.Fatal(err)
		}
		if err := vm.Close(); err != nil {
			t.Fatal(err)
		}
	}
	awaitDomain(t, l.A, "running") // after the last connection has ended
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// TestKilledWhileItIsAsked kills a QEMU while libvirt passes a command on to it. Package qemu reports that QEMU has
// ended, whichever error libvirt returns.
func TestKilledWhileItIsAsked(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startLibvirt(t, l)
	address := libvirt.Address(l.A.Path(lab.LibvirtSocket), lab.DomainName)
	for range 2 {
		var guest report.Log
		port := runDomain(t, l.A, domainVM(t), false, &guest)
		vm, err := qemu.Attach(testContext(t), address)
		if err != nil {
			t.Fatal(err)
		}
		asked := make(chan struct{})
		ended := make(chan error, 1)
		ctx := testContext(t)
		go func() {
			_, err := vm.Status(ctx)
			close(asked)
			for err == nil {
				_, err = vm.Status(ctx)
			}
			ended <- err
		}()
		<-asked
		if err := syscall.Kill(vm.Pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		err = <-ended
		if gone := new(qmp.DisconnectedError); !errors.As(err, &gone) {
			t.Errorf("it is not known to have ended: %v", err)
		}
		_ = vm.Close()
		awaitDomain(t, l.A, "")
		if err := port.Close(); err != nil {
			t.Error(err)
		}
	}
}
