// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"regexp"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestRequireSecure requires a supervised userfaultfd, at the source and at the destination. A host without one refuses
// before the VM is touched and says what it lacks. Any other host accepts the VM.
func TestRequireSecure(t *testing.T) {
	t.Parallel()
	state, label, err := uffd.ProbeSupervision()
	if err != nil {
		testenv.CannotRun(t, "no userfaultfd: %v", err)
	}
	t.Logf("a userfaultfd of this process is %v, labelled %q", state, label)
	for _, c := range []struct {
		name      string
		migrate   []string // flags of migrate
		serve     []string // flags of serve, at the destination
		requires  bool
		who       string // in the message
		otherwise string // in the remedy
	}{
		{"nobody", nil, nil, false, "", ""},
		{"the migration", []string{"--require-secure"}, nil, true,
			"this migration requires a supervised one (--require-secure)", "migrate without --require-secure"},
		{"the destination", nil, []string{"--require-secure"}, true,
			"the destination's require_secure requires a supervised one", "unset require_secure there"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newHosts(t)
			startDaemon(t, l.A)
			startDaemon(t, l.B, c.serve...)
			s := newScene(t, l)
			out, code := operate(t, l.A,
				append([]string{"migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "secure",
					"--freeze-limit", "2m"}, c.migrate...)...)
			t.Logf("migrate: exit code %d:\n%s", code, out)
			for _, h := range l.Hosts() {
				wantSupervision(t, h, "secure", state)
			}
			if state != uffd.Unsupervised || !c.requires {
				if code != 0 {
					t.Fatalf("exit code %d", code)
				}
				s.arrived()
				return
			}
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			for _, words := range []string{
				"the destination QEMU's userfaultfd is unsupervised", c.who, "no UFFD_SECURE", "no SELinux policy",
				"What to do: on the destination, boot a kernel", "kernel/README.md", "deploy/selinux", c.otherwise,
			} {
				if !strings.Contains(out, words) {
					t.Errorf("it does not say %q", words)
				}
			}
			awaitNoQEMU(t, l.B)
			if status := vmStatus(t, l.A); status != "running" {
				t.Errorf("the VM is %q on the source", status)
			}
			goesOn(t, l.A)
			checkMetal(t, s.vm, l.A)
		})
	}
}

// TestCheckSupervision: check shows the supervision that a migration would get. A host that requires more than it has
// cannot be a destination.
func TestCheckSupervision(t *testing.T) {
	t.Parallel()
	state, _, err := uffd.ProbeSupervision()
	if err != nil {
		testenv.CannotRun(t, "no userfaultfd: %v", err)
	}
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B, "--require-secure")
	possible := map[bool]int{true: 0, false: 4}[state != uffd.Unsupervised]
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"check"}, 0},
		{[]string{"check", "--to", l.B.DaemonAddr()}, possible},
	} {
		out, code := operate(t, l.A, c.args...)
		if code != c.code || !strings.Contains(out, "userfaultfd supervision") || !strings.Contains(out, state.String()) {
			t.Errorf("%v: exit code %d, want %d and %v:\n%s", c.args, code, c.code, state, out)
		}
		if state == uffd.Unsupervised && !strings.Contains(out, "deploy/selinux") {
			t.Errorf("%v does not say what to do:\n%s", c.args, out)
		}
		t.Logf("%v: exit code %d:\n%s", c.args, code, out)
	}
}

// wantSupervision checks the supervision that a host shows for a migration, in the API and in status. After a refusal,
// only the destination shows it.
func wantSupervision(t *testing.T, h *lab.Host, id string, want uffd.Supervision) {
	t.Helper()
	m := get(t, h, id)
	if m.GetState() == stateFailed && m.GetRole() == migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE {
		return
	}
	shown := map[uffd.Supervision]migratedv1.Supervision{
		uffd.Unsupervised: migratedv1.Supervision_SUPERVISION_UNSUPERVISED,
		uffd.Labelled:     migratedv1.Supervision_SUPERVISION_LABELLED,
		uffd.Flagged:      migratedv1.Supervision_SUPERVISION_FLAG,
	}[want]
	if m.GetSupervision() != shown || (m.GetUserfaultfdLabel() == "") == (want == uffd.Labelled) {
		t.Errorf("host %s shows %v, labelled %q; want %v", h.Name, m.GetSupervision(), m.GetUserfaultfdLabel(), want)
	}
	out, code := operate(t, h, "status", id)
	if code != 0 || !regexp.MustCompile(`(?m)^Userfaultfd +`+want.String()).MatchString(out) {
		t.Errorf("status on host %s: exit code %d, want %v in\n%s", h.Name, code, want, out)
	}
}
