// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// follower follows the list of migrations of a host and records what the client reports.
type follower struct {
	*client.Follower

	mu     sync.Mutex
	told   []string // "+id", "id STATE" and "-id"
	synced int
}

// followHost follows the migrations of a host that have these labels, until the test is over.
func followHost(t *testing.T, h *lab.Host, label map[string]string) *follower {
	t.Helper()
	f := &follower{}
	tell := func(format string, args ...any) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.told = append(f.told, fmt.Sprintf(format, args...))
	}
	f.Follower = client.NewFollower(dialHost(t, h), &migratedv1.MigrationFilter{Labels: label}, client.Handlers{
		Added: func(m *migratedv1.Migration) { tell("+%s", m.GetId()) },
		Changed: func(before, after *migratedv1.Migration) {
			if before.GetState() != after.GetState() {
				tell("%s %s", after.GetId(), strings.TrimPrefix(after.GetState().String(), "MIGRATION_STATE_"))
			}
		},
		Removed: func(m *migratedv1.Migration) { tell("-%s", m.GetId()) },
		Synced: func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.synced++
		},
	})
	ctx, cancel := context.WithCancel(testContext(t))
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("host %s cannot be followed: %v", h.Name, err)
		}
	})
	return f
}

// until waits until enough accepts what was recorded. what is for the error.
func (f *follower) until(t *testing.T, what string, enough func(told []string, synced int) bool) {
	t.Helper()
	eventually(t, func() error {
		f.mu.Lock()
		told, synced := slices.Clone(f.told), f.synced
		f.mu.Unlock()
		if !enough(told, synced) {
			return fmt.Errorf("%s: it was told %v, and all of it %d times", what, told, synced)
		}
		return nil
	})
}

// dialHost connects to a host's daemon until the test is over.
func dialHost(t *testing.T, h *lab.Host) *client.Client {
	t.Helper()
	c, err := client.Dial(h.Path(lab.DaemonSocket), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// TestFollowedByAProgram drives migrations as an orchestrator does, with package client. It follows both hosts. A
// migration that misses its prepare_limit is given up, the next one moves the VM and is deleted on both hosts, and the
// follower goes on after a restart of the daemon.
func TestFollowedByAProgram(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	daemon := startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := newScene(t, l)
	label := map[string]string{"evacuation": "a-7"}
	a, b := followHost(t, l.A, label), followHost(t, l.B, label)
	c, ctx := dialHost(t, l.A), testContext(t)
	for _, f := range []*follower{a, b} {
		f.until(t, "at the beginning", func(_ []string, synced int) bool { return synced >= 1 })
	}

	// The VM's QEMU does not answer, so the migration misses its prepare_limit.
	spec := s.spec()
	spec.Labels, spec.PrepareLimit = map[string]string{"evacuation": "a-7", "team": "db"}, durationpb.New(5*time.Second)
	qemu := qemuOn(t, l.A)
	kill(t, qemu, syscall.SIGSTOP)
	_, err := c.Migrate(ctx, "late", spec, nil)
	kill(t, qemu, syscall.SIGCONT)
	var told *client.Error
	if !errors.Is(err, client.ErrFailed) || !errors.As(err, &told) ||
		told.Reason != migratedv1.Reason_REASON_LIMIT_MISSED ||
		!strings.Contains(told.Message, "prepare_limit") || !strings.Contains(told.VMStatus, "not touched") {
		t.Fatalf("a VM that did not answer: %v", err)
	}
	goesOn(t, l.A)

	// The same VM, now that it answers.
	spec.PrepareLimit, spec.TotalLimit = durationpb.New(time.Minute), durationpb.New(time.Hour)
	spec.Bandwidth = 1 << 20 // until both followers have seen the switch
	var early error
	var seen bool
	m, err := c.Migrate(ctx, "m", spec, func(m *migratedv1.Migration) {
		if early == nil && !client.Over(m.GetState()) {
			_, early = c.Delete(ctx, &migratedv1.DeleteRequest{Id: "m"})
		}
		if m.GetState() == stateActive && !seen {
			seen = true
			for _, f := range []*follower{a, b} {
				f.until(t, "of the switch", func(told []string, _ int) bool {
					return slices.Contains(told, "m POSTCOPY_ACTIVE")
				})
			}
			unlimit(t, control(t, l.B), "m")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(early, client.ErrRefused) {
		t.Errorf("a migration under way is deleted: %v", early)
	}
	s.arrived()
	there := get(t, l.B, "m")
	for host, m := range map[string]*migratedv1.Migration{"source": m, "destination": there} {
		created, started := m.GetCreateTime().AsTime(), m.GetStartTime().AsTime()
		switched, ended := m.GetSwitchTime().AsTime(), m.GetEndTime().AsTime()
		if m.GetStartTime() == nil || m.GetSwitchTime() == nil ||
			started.Before(created) || switched.Before(started) || ended.Before(switched) {
			t.Errorf("at the %s it began %v, was started %v, switched over %v and over %v",
				host, created, started, switched, ended)
		}
		if q := m.GetDestinationQemu(); m.GetSpec().GetLabels()["team"] != "db" ||
			q.GetQmp() != lab.QMPPath || q.GetLog() == "" ||
			q.GetPid() == 0 || q.GetPid() != there.GetDestinationQemu().GetPid() || m.GetOverdue() {
			t.Errorf("at the %s it is %v", host, m)
		}
	}
	out, code := operate(t, l.B, "list", "--label", "team=db", "--label", "evacuation=a-7",
		"--role", "destination", "--json")
	if code != 0 || strings.Count(out, `"id":"m"`) != 1 {
		t.Errorf("list: exit code %d:\n%s", code, out)
	}

	// A migration that is over can be deleted on either host.
	for h, f := range map[*lab.Host]*follower{l.A: a, l.B: b} {
		if _, err := dialHost(t, h).Delete(ctx, &migratedv1.DeleteRequest{Id: "m"}); err != nil {
			t.Errorf("delete at host %s: %v", h.Name, err)
		}
		f.until(t, "when it is deleted", func(told []string, _ int) bool { return slices.Contains(told, "-m") })
	}
	if out, code := operate(t, l.B, "report", "m"); code != 6 {
		t.Errorf("its report is there: exit code %d:\n%s", code, out)
	}
	s.arrived()

	// A daemon that is started again does not know a migration that failed before the switch.
	if err := daemon.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.A)
	a.until(t, "of a daemon that was started again", func(told []string, synced int) bool {
		return synced >= 2 && slices.Contains(told, "-late")
	})
	if left := a.Migrations(); len(left) != 0 {
		t.Errorf("it has %v", left)
	}
	want := []string{"+late", "late FAILED", "+m", "m POSTCOPY_ACTIVE", "m COMPLETED", "-m", "-late"}
	if byA, byB := a.lasting(), b.lasting(); !slices.Equal(byA, want) || !slices.Equal(byB, want[2:6]) {
		t.Errorf("the program was told\n%v by the source, and\n%v by the destination", byA, byB)
	}
}

// lasting returns what was recorded, except for states that a migration may pass through unseen on a busy host.
func (f *follower) lasting() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.told), func(s string) bool {
		return strings.HasSuffix(s, " DEVICE") || strings.HasSuffix(s, " HANDOVER")
	})
}

// TestOverdue moves a paused VM whose memory arrives slowly. When total_limit passes after the hand-over, the migration
// goes on, and both hosts show that it is overdue.
func TestOverdue(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	for _, h := range l.Hosts() {
		startDaemon(t, h, "--metrics-listen", metricsSocket)
	}
	s := newScene(t, l)
	command(t, l.A, "stop")
	spec := s.spec()
	spec.Bandwidth, spec.TotalLimit = bandwidth.Least, durationpb.New(6*time.Second)
	c, ctx := dialHost(t, l.A), testContext(t)
	if _, err := c.Prepare(ctx, &migratedv1.PrepareRequest{Id: "m", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	await(t, control(t, l.A), "m", (*migratedv1.Migration).GetPrepared)
	if _, err := c.Start(ctx, &migratedv1.StartRequest{Id: "m"}); err != nil {
		t.Fatal(err)
	}
	for _, h := range l.Hosts() {
		m := await(t, control(t, h), "m", (*migratedv1.Migration).GetOverdue)
		if m.GetState() != stateActive || m.GetError() != nil {
			t.Fatalf("host %s shows %v", h.Name, m)
		}
		if late, found := sum(t, scrape(t, h), "migrated_migrations_overdue"); late != 1 || found == 0 {
			t.Errorf("host %s counts %v that are overdue, in %d series", h.Name, late, found)
		}
	}
	if _, err := c.SetBandwidth(ctx, &migratedv1.SetBandwidthRequest{Id: "m"}); err != nil {
		t.Fatal(err)
	}
	m, err := c.Wait(ctx, "m", nil)
	if err != nil || !m.GetOverdue() {
		t.Fatalf("it ended as %v, %v", m, err)
	}
	if late, found := sum(t, scrape(t, l.A), "migrated_migrations_overdue"); late != 0 || found == 0 {
		t.Errorf("%v are overdue when it is over, in %d series", late, found)
	}
	for _, h := range l.Hosts() {
		if out, code := operate(t, h, "report", "m"); code != 0 || !strings.Contains(out, "total_limit of 6.0 s; it took") ||
			!strings.Contains(out, "OVERDUE") {
			t.Errorf("host %s reports, exit code %d:\n%s", h.Name, code, out)
		}
	}
	command(t, l.B, "cont")
	s.arrived()
}
