// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// needRealVM calls testenv.CannotRun if this machine cannot give a VM disks or network cards.
func needRealVM(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		testenv.CannotRun(t, "disks are made by qemu-img, of package qemu-utils: %v", err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		testenv.CannotRun(t, "network cards are taps: %v", err)
	}
}

// linux makes c boot the Linux guest, with a disk and a network card that the guest uses.
func linux(t *testing.T, c lab.VMConfig, args ...string) lab.VMConfig {
	t.Helper()
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return c.Real(kernel, initrd, 1, 1, args...)
}

// verifyLinux has the guest check all of its memory and its disks. It returns the result, or fails the test if there is
// damage.
func verifyLinux(t *testing.T, guest *report.Log, port *report.Port) *report.Verified {
	t.Helper()
	v, err := port.Verify(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := guest.Err(); err != nil ||
		v.Corruptions != 0 || v.Pages == 0 || v.Found != 0 || v.Blocks == 0 || v.BlocksFound != 0 {
		t.Fatalf("the guest found damage: %+v: %v", v, err)
	}
	return v
}

// plainLinux makes c boot the Linux guest without a disk or a network card.
func plainLinux(t *testing.T, c lab.VMConfig, args ...string) lab.VMConfig {
	t.Helper()
	kernel, initrd, err := image.Linux(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	c.Kernel, c.Initrd, c.KernelArgs = kernel, initrd, args
	return c
}

// metal makes c boot the bare-metal guest.
func metal(t *testing.T, c lab.VMConfig) lab.VMConfig {
	t.Helper()
	disk, err := image.Metal(testContext(t), c.MemoryMiB)
	if err != nil {
		t.Fatal(err)
	}
	c.Disk = disk
	return c
}

// needKVM skips a test if this machine has no KVM, in CI as well: the kernels that e2e/kernel/secure boots have a
// nested KVM, in which VMs move on every run.
func needKVM(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("no KVM on this machine (%v); e2e/kernel/secure moves VMs in a nested one", err)
	}
}
