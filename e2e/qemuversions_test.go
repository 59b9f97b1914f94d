// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestQEMUVersions moves a VM there and back between hosts with a newer QEMU than the installed one, which most other
// tests use. Each daemon starts the QEMU of its host.
func TestQEMUVersions(t *testing.T) {
	t.Parallel()
	for _, version := range lab.QEMUVersions {
		if version == lab.InstalledQEMU {
			continue
		}
		t.Run(version, func(t *testing.T) {
			l := newHosts(t)
			for _, h := range l.Hosts() {
				useQEMU(t, h, version)
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

// checkVersion checks that the VM on h runs in that version of QEMU.
func checkVersion(t *testing.T, h *lab.Host, want string) {
	t.Helper()
	if got, err := h.QEMUVersion(testContext(t)); got != want || err != nil {
		t.Errorf("the VM on host %s runs in QEMU %s, %v; want %s", h.Name, got, err, want)
	}
}
