// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestUseQEMU checks the version of a host's QEMU. The other host has the installed version throughout.
func TestUseQEMU(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, version := range lab.QEMUVersions {
		t.Run(version, func(t *testing.T) {
			if version != lab.InstalledQEMU {
				if _, err := emulator.Dir(t.Context(), version); err != nil {
					testenv.CannotRun(t, "%v", err)
				}
			}
			l := newLab(t)
			t.Cleanup(func() {
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			})
			if err := l.A.UseQEMU(t.Context(), version); err != nil {
				t.Fatal(err)
			}
			// QEMU loads all of its modules for this.
			if out, err := l.A.Run(t.Context(), "qemu-system-x86_64", "-device", "help"); err != nil || out == "" {
				t.Errorf("its devices: %q, %v", out, err)
			}
			vm := lab.VMConfig{VCPUs: 1, MemoryMiB: 64, Disk: disk}
			for host, want := range map[*lab.Host]string{l.A: version, l.B: lab.InstalledQEMU} {
				if _, err := host.StartVM(t.Context(), vm); err != nil {
					t.Fatal(err)
				}
				if got, err := host.QEMUVersion(t.Context()); got != want || err != nil {
					t.Errorf("host %s runs QEMU %s, %v; want %s", host.Name, got, err, want)
				}
				// A daemon can inspect the process: its program is QEMU itself, at the usual path.
				pids, err := host.Processes("qemu-system-x86_64")
				if err != nil || len(pids) != 1 {
					t.Fatalf("host %s has QEMU processes %v, %v", host.Name, pids, err)
				}
				if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pids[0])); exe != "/usr/bin/qemu-system-x86_64" {
					t.Errorf("the program of QEMU is %q, %v", exe, err)
				}
			}
		})
	}
}

func TestUseQEMURefusesUnknownVersions(t *testing.T) {
	l := newLab(t)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := l.A.UseQEMU(t.Context(), "9.9"); err == nil {
		t.Error("QEMU 9.9 is accepted")
	}
}
