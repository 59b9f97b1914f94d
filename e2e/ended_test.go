// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// monitor runs a command of QEMU's human monitor on a host. The tests use it to write to I/O ports as the guest could.
func monitor(t *testing.T, h *lab.Host, line string) {
	t.Helper()
	ask(t, h, "human-monitor-command", map[string]string{"command-line": line}, nil)
}

// TestVMEndsAfterTheSwitch checks that a migration has not failed if the VM ends by itself while its memory is
// arriving. No host advises the operator to continue the VM at the source, because its memory there is older than its
// disks.
func TestVMEndsAfterTheSwitch(t *testing.T) {
	t.Parallel()
	// SLP_EN and S5 in PM1a_CNT; the chipset's reset register.
	const powerOff, resetNow = "o /h 0x604 0x2000", "o /b 0xcf9 6"
	for name, c := range map[string]struct {
		extra  []string
		end    func(t *testing.T, l *lab.Lab)
		reason migratedv1.Reason
		words  string
	}{
		"the guest powers off": {
			end:    func(t *testing.T, l *lab.Lab) { monitor(t, l.B, powerOff) },
			reason: migratedv1.Reason_REASON_GUEST_SHUTDOWN, words: "powered off",
		},
		"the guest resets, and QEMU ends then": {
			extra:  []string{"-no-reboot"},
			end:    func(t *testing.T, l *lab.Lab) { monitor(t, l.B, resetNow) },
			reason: migratedv1.Reason_REASON_GUEST_RESET, words: "reset",
		},
		"the guest panics": {
			extra:  []string{"-device", "pvpanic"},
			end:    func(t *testing.T, l *lab.Lab) { monitor(t, l.B, "o /b 0x505 1") },
			reason: migratedv1.Reason_REASON_GUEST_PANIC, words: "panicked",
		},
		"somebody has QEMU quit": {
			end:    func(t *testing.T, l *lab.Lab) { ask(t, l.B, "quit", nil, nil) },
			reason: migratedv1.Reason_REASON_QEMU_QUIT, words: "quit",
		},
		"somebody ends QEMU by a signal": {
			end:    func(t *testing.T, l *lab.Lab) { kill(t, qemuOn(t, l.B), syscall.SIGTERM) },
			reason: migratedv1.Reason_REASON_QEMU_SIGNALLED, words: "signal",
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newHosts(t)
			startDaemon(t, l.A)
			there := startDaemon(t, l.B)
			s := sceneOf(t, l, lab.VMConfig{MemoryMiB: 1024, Extra: c.extra}.WithDevices(1, 1))
			client := s.moveSlowly("ended")
			c.end(t, l)
			ended := func(h *lab.Host) {
				t.Helper()
				m := awaitEnd(t, control(t, h), "ended")
				says := m.GetError()
				if m.GetState() != stateEnded || says.GetReason() != c.reason ||
					m.GetLocation() != migratedv1.Location_LOCATION_ENDED ||
					!strings.Contains(says.GetMessage(), c.words) || strings.Contains(says.GetRemedy(), "fallback") {
					t.Errorf("on host %s it is %v, the VM %v: %v", h.Name, m.GetState(), m.GetLocation(), says)
				}
			}
			ended(l.A)
			ended(l.B)
			for _, h := range l.Hosts() {
				awaitNoQEMU(t, h)
			}
			nothingKept(t, l.A)
			_, err := client.FallBack(testContext(t), &migratedv1.FallBackRequest{Id: "ended", DestinationIsGone: true})
			if status.Code(err) != codes.FailedPrecondition {
				t.Errorf("falling back to older memory: %v", err)
			}
			if out, code := operate(t, l.A, "watch", "ended"); code != 7 || !strings.Contains(out, c.words) {
				t.Errorf("watch: exit code %d: %s", code, out)
			}
			// The next daemon must know the end as well, because the source may not have heard of it.
			if err := there.Stop(testContext(t)); err != nil {
				t.Error(err)
			}
			startDaemon(t, l.B)
			ended(l.B)
		})
	}
}

// TestGuestResetsAfterTheSwitch checks that QEMU and the migration continue after the guest resets. The guest boots
// again at the destination.
func TestGuestResetsAfterTheSwitch(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	client := s.moveSlowly("reset")
	systemReset(t, l.B, lab.EventsPath)
	inFlight(t, "reset", l.B)
	unlimit(t, client, "reset")
	completed(t, awaitEnd(t, client, "reset"))
	const first = "00000001\n" // the first pass, which the guest had written at the source
	eventually(t, func() error {
		text, err := os.ReadFile(l.B.Path(lab.SerialLog))
		if err == nil && !strings.Contains(string(text), first) {
			err = fmt.Errorf("the guest has not begun again: %.200q", text)
		}
		return err
	})
	goesOn(t, l.B)
}
