// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/cannot"
)

// TestQEMUVersions moves a VM there and back between hosts with a newer QEMU than the installed one, which all other
// tests move VMs with. The daemon starts the QEMU of its own host.
func TestQEMUVersions(t *testing.T) {
	t.Parallel()
	for _, version := range lab.QEMUVersions {
		if version == lab.InstalledQEMU {
			continue
		}
		t.Run(version, func(t *testing.T) {
			if _, err := emulator.Dir(testContext(t), version); err != nil {
				cannot.Run(t, "%v", err)
			}
			l := newHosts(t)
			for _, h := range []*lab.Host{l.A, l.B} {
				if err := h.UseQEMU(testContext(t), version); err != nil {
					t.Fatal(err)
				}
				startDaemon(t, h)
			}
			s := newScene(t, l)
			checkVersion(t, l.A, version)
			migrate(t, l.A, l.B, "there")
			s.arrived()
			checkVersion(t, l.B, version)

			pass := metalPass(t, l.B, func(uint64) bool { return true })
			migrate(t, l.B, l.A, "back")
			metalPass(t, l.A, func(p uint64) bool { return p > pass+1 })
			checkMetal(t, s.vm, l.A)
			checkVersion(t, l.A, version)
		})
	}
}

// checkVersion wants the VM on h to run in that version of QEMU.
func checkVersion(t *testing.T, h *lab.Host, want string) {
	t.Helper()
	if got, err := h.QEMUVersion(testContext(t)); got != want || err != nil {
		t.Errorf("the VM on host %s runs in QEMU %s, %v; want %s", h.Name, got, err, want)
	}
}
