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

// needRealVM is for VMs with disks or network cards.
func needRealVM(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		testenv.CannotRun(t, "disks are made by qemu-img, of package qemu-utils: %v", err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		testenv.CannotRun(t, "network cards are taps: %v", err)
	}
}

// linux gives c a disk and a network card, which its Linux guest has at work.
func linux(t *testing.T, c lab.VMConfig, args ...string) lab.VMConfig {
	t.Helper()
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return c.Real(kernel, initrd, 1, 1, args...)
}

// verifyLinux has the guest check all of its memory and of its disks, and returns what it says.
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

// plainLinux makes c boot the Linux guest, which has neither a disk nor a network card.
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

// needKVM is for tests that need the machine's own KVM. Where there is none they are skipped, in CI as well: the
// kernels that e2e/kernel/secure boots have a KVM of their own, in which VMs move each time.
func needKVM(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("no KVM on this machine (%v); e2e/kernel/secure moves VMs in a nested one", err)
	}
}
