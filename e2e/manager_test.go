// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// startSystemd starts systemd on a host.
func startSystemd(t *testing.T, h *lab.Host) {
	t.Helper()
	if err := h.Manage(testContext(t)); errors.Is(err, lab.ErrNoSystemd) {
		testenv.CannotRun(t, "%v", err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// managedHosts makes two hosts on which systemd runs the daemon with the unit deploy/migrated.service.
func managedHosts(t *testing.T, link lab.Link) *lab.Lab {
	t.Helper()
	l := linkedHosts(t, link)
	for _, h := range l.Hosts() {
		startSystemd(t, h)
		t.Cleanup(func() {
			if t.Failed() {
				text, _ := os.ReadFile(h.Path("/run/migrated.log"))
				t.Logf("daemon of host %s:\n%s", h.Name, text)
			}
		})
		if err := h.InstallUnit(testContext(t), "../deploy/migrated.service"); err != nil {
			t.Fatal(err)
		}
		systemctl(t, h, "start", "migrated")
	}
	return l
}

func systemctl(t *testing.T, h *lab.Host, args ...string) {
	t.Helper()
	if err := h.Systemctl(testContext(t), args...); err != nil {
		out, _ := h.Run(testContext(t), "systemctl", "status", "migrated")
		t.Fatalf("%v\n%s", err, out)
	}
}

// killUnit kills a host's daemon with SIGKILL. It returns when systemd has started the daemon again.
func killUnit(t *testing.T, h *lab.Host) {
	t.Helper()
	before := unitProperty(t, h, "NRestarts")
	systemctl(t, h, "kill", "--signal=KILL", "--kill-whom=main", "migrated")
	awaitRestart(t, h, before)
}

// restartUnit restarts a host's daemon by systemctl, as an upgrade does.
func restartUnit(t *testing.T, h *lab.Host) {
	t.Helper()
	systemctl(t, h, "restart", "migrated")
}

func unitProperty(t *testing.T, h *lab.Host, name string) string {
	t.Helper()
	out, err := h.Run(testContext(t), "systemctl", "show", "--value", "--property="+name, "migrated")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// TestRestartUnderSystemd kills and restarts daemons in the middle of the migrations of a busy guest. systemd starts
// them again, and each migration completes. The listening sockets stay the same, so no connection is refused meanwhile.
// The test logs the guest's longest stalls. MIGRATED_ROUNDS=10 gives the figures in docs/faults.md.
func TestRestartUnderSystemd(t *testing.T) {
	t.Parallel()
	rounds := 1
	if text := os.Getenv("MIGRATED_ROUNDS"); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	l := managedHosts(t, travellerLink)
	v := newTraveller(t, l)
	stalls := map[string][]time.Duration{}
	faults := []struct {
		name string
		do   func(from, to *lab.Host)
	}{
		{"nothing", func(*lab.Host, *lab.Host) {}},
		{"destination daemon killed", func(_, to *lab.Host) { killUnit(t, to) }},
		{"destination daemon restarted", func(_, to *lab.Host) { restartUnit(t, to) }},
		{"source daemon killed", func(from, _ *lab.Host) { killUnit(t, from) }},
		{"source daemon restarted", func(from, _ *lab.Host) { restartUnit(t, from) }},
	}
	for range rounds {
		for _, fault := range faults {
			from, to := v.at, v.lab.Other(v.at)
			before := slices.Concat(listeners(t, from), listeners(t, to))
			stall := v.move(func(id string) {
				fault.do(from, to)
				inFlight(t, id, to)
			})
			if after := slices.Concat(listeners(t, from), listeners(t, to)); !slices.Equal(before, after) {
				t.Errorf("%s: the sockets %v are now %v", fault.name, before, after)
			}
			stalls[fault.name] = append(stalls[fault.name], stall)
		}
	}
	for _, fault := range faults {
		all := stalls[fault.name]
		slices.Sort(all)
		t.Logf("%-30s the guest's longest stall: p50 %v, max %v of %d", fault.name,
			all[(len(all)-1)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond), len(all))
	}
}

// listeners returns the inodes of the sockets at which a host's daemon listens: one for daemons, one for operators.
func listeners(t *testing.T, h *lab.Host) []string {
	t.Helper()
	var inodes []string
	port, err := strconv.Atoi(lab.DaemonPort)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range []struct {
		path, state, address string
		columns              [3]int // of address, state and inode
	}{
		{"/proc/net/tcp", "0A", fmt.Sprintf(":%04X", port), [3]int{1, 3, 9}},
		{"/proc/net/unix", "01", lab.DaemonSocket, [3]int{7, 5, 6}},
	} {
		out, err := h.Run(testContext(t), "cat", table.path)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for line := range strings.Lines(out) {
			fields := strings.Fields(line)
			if c := table.columns; len(fields) > max(c[0], c[2]) &&
				strings.HasSuffix(fields[c[0]], table.address) && fields[c[1]] == table.state {
				inodes = append(inodes, fields[c[2]])
				found++
			}
		}
		if found != 1 {
			t.Errorf("%d sockets listen at %s on host %s:\n%s", found, table.address, h.Name, out)
		}
	}
	return inodes
}
