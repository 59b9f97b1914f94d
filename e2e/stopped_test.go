// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestVMThatStopsByItself: a VM that stops by itself after it was prepared is not treated as one that an operator
// paused. It is not moved: that would hide what is wrong with it, and a guest that sleeps could not be woken at the
// destination.
func TestVMThatStopsByItself(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		extra  []string
		stop   string // a command of the human monitor
		status string
		words  []string
	}{
		"its guest panicked": {
			[]string{"-device", "pvpanic", "-action", "panic=pause"}, "o /b 0x505 1", "guest-panicked",
			[]string{"guest-panicked", "has stopped by itself"},
		},
		"its guest sleeps": { // SLP_EN and S3 in PM1a_CNT
			nil, "o /h 0x604 0x2400", "suspended", []string{"system_wakeup", "its guest sleeps"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			s := sceneOf(t, l, lab.VMConfig{Extra: c.extra}.WithDevices(1, 1))
			prepare(s.T, control(s.T, s.lab.A), "stops", s.spec())
			monitor(t, l.A, c.stop)
			eventually(t, func() error { // QEMU's main loop stops it a little later
				if status := vmStatusBy(t, l.A); status != c.status {
					return fmt.Errorf("the VM is %q, want %q", status, c.status)
				}
				return nil
			})
			m := s.startPrepared("stops")
			says := m.GetError()
			all := says.GetMessage() + "\n" + says.GetRemedy() + "\n" + says.GetVmStatus()
			if m.GetState() != stateFailed || says.GetReason() != migratedv1.Reason_REASON_VM_STOPPED_ITSELF ||
				m.GetLocation() != migratedv1.Location_LOCATION_SOURCE {
				t.Errorf("migration is %v, the VM %v: %v", m.GetState(), m.GetLocation(), says)
			}
			for _, word := range c.words {
				if !strings.Contains(all, word) {
					t.Errorf("it does not say %q: %s", word, all)
				}
			}
			if status := vmStatusBy(t, l.A); status != c.status {
				t.Errorf("the VM is %q", status)
			}
			if pid := qemuOn(t, l.B); pid != 0 {
				t.Errorf("QEMU process %d is left on the destination", pid)
			}
		})
	}
}

// vmStatusBy returns the VM's status from its second monitor, because the daemon uses the first.
func vmStatusBy(t *testing.T, h *lab.Host) string {
	t.Helper()
	var state struct {
		Status string `json:"status"`
	}
	ask(t, h, "query-status", nil, &state)
	return state.Status
}
