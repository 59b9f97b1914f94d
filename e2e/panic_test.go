// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestPanicUnderSystemd makes the destination's daemon panic when the VM runs there and most of its memory has not
// arrived. systemd starts the daemon again, and the VM continues. After an error in the configuration, systemd does not
// start it again.
func TestPanicUnderSystemd(t *testing.T) {
	t.Parallel()
	l := managedHosts(t, travellerLink)
	l.B.Daemon = buildDaemon(t, "chaos") // reads /run/chaos: internal/migration/point_chaos.go
	if err := l.B.InstallUnit(testContext(t), "../deploy/migrated.service"); err != nil {
		t.Fatal(err)
	}
	systemctl(t, l.B, "restart", "migrated")
	const point = "destination-running"
	if err := os.MkdirAll(l.B.Path("/run/chaos"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.B.Path("/run/chaos/"+point), []byte("panic"), 0o600); err != nil {
		t.Fatal(err)
	}
	v := newTraveller(t, l)
	stall := v.move(func(id string) {
		awaitRestart(t, l.B, "0")
		inFlight(t, id, l.B)
	})
	t.Logf("the guest's longest stall: %v", stall.Round(time.Millisecond))
	log, err := os.ReadFile(l.B.Path("/run/migrated.log"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "panic: told to at "+point) {
		t.Errorf("the daemon did not panic:\n%s", log)
	}
	if restarts := unitProperty(t, l.B, "NRestarts"); restarts != "1" {
		t.Errorf("systemd started the daemon %s times again, want once", restarts)
	}

	// On SIGHUP the daemon reads its configuration again. It ignores a wrong one, but does not start with it.
	pid := unitProperty(t, l.A, "MainPID")
	conf := l.A.Path("/run/migrated.yaml")
	if err := os.WriteFile(conf, []byte("bandwidth: 500M\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.A.InstallUnit(testContext(t), "../deploy/migrated.service", "--config", "/run/migrated.yaml"); err != nil {
		t.Fatal(err)
	}
	systemctl(t, l.A, "restart", "migrated")
	if now := unitProperty(t, l.A, "MainPID"); now == pid {
		t.Fatal("the daemon was not restarted")
	} else {
		pid = now
	}
	if err := os.WriteFile(conf, []byte("bandwidth: fast\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	systemctl(t, l.A, "reload", "migrated")
	awaitLogged(t, l.A, "configuration not reloaded")
	if now := unitProperty(t, l.A, "MainPID"); now != pid {
		t.Errorf("after a reload the daemon is process %s, before it %s", now, pid)
	}
	if err := l.A.Systemctl(testContext(t), "restart", "migrated"); err == nil {
		t.Error("a daemon with a wrong configuration starts")
	}
	if state, status := unitProperty(t, l.A, "ActiveState"), unitProperty(t, l.A, "ExecMainStatus"); state != "failed" ||
		status != "78" {
		t.Errorf("with a wrong configuration the unit is %s after exit code %s, want failed after 78", state, status)
	}
}

// awaitRestart waits until systemd has restarted a host's daemon. before is the unit's NRestarts from before that.
func awaitRestart(t *testing.T, h *lab.Host, before string) {
	t.Helper()
	eventually(t, func() error {
		switch state := unitProperty(t, h, "ActiveState"); {
		case state == "failed":
			t.Fatalf("systemd does not start the daemon again: it ended with exit code %s", unitProperty(t, h, "ExecMainStatus"))
		case state != "active" || unitProperty(t, h, "NRestarts") == before:
			return errors.New("systemd has not started the daemon again")
		}
		return nil
	})
}

// awaitLogged waits until a managed host's daemon has logged a text.
func awaitLogged(t *testing.T, h *lab.Host, text string) {
	t.Helper()
	eventually(t, func() error {
		log, err := os.ReadFile(h.Path("/run/migrated.log"))
		if err == nil && !strings.Contains(string(log), text) {
			err = fmt.Errorf("the daemon of host %s does not log %q:\n%s", h.Name, text, log)
		}
		return err
	})
}
