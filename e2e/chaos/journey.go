// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A journey is one migration of one machine, whatever becomes of it.
type journey struct {
	stage    *stage
	machine  *machine
	from, to *lab.Host
	id       string
	began    time.Time
	settled  time.Time
	notes    []string // what its operator did
	orphaned bool     // its source QEMU was killed after the switch
	ended    bool     // its guest, or its operator, has ended it
	mapped   bool     // a process that has nothing to do with it maps its RAM
	// restarted: its guest has begun anew, and knows nothing of what was before.
	restarted bool
	// stopped is a daemon that the case told to stop, and that is to be started again; nil: none.
	stopped *lab.Process
}

// The ends of a journey.
const (
	endMoved    = "moved"     // the VM runs at the destination, all of it
	endStayed   = "stayed"    // the VM runs at the source, as if nothing had been
	endFellBack = "fell back" // the VM runs at the source, as it was at the switch
	// endOrphaned: memory that was the source QEMU's alone ended with it, and its operator has ended the VM.
	endOrphaned = "lost because its source QEMU was killed"
)

// patience bounds how long a migration may take to come to its end once nothing is broken any more: a source repeats the
// hand-over with pauses, TCP waits for twice as long as a network was cut, and a destination that is not told to run gives up after a minute.
const patience = 150 * time.Second

func (s *stage) newJourney(m *machine, id string) *journey {
	return &journey{stage: s, machine: m, from: m.at, to: m.other(m.at), id: id}
}

func (j *journey) spec() *migratedv1.MigrationSpec {
	return &migratedv1.MigrationSpec{Vm: j.machine.keeper.address(j.machine), Destination: j.to.DaemonAddr()}
}

// start begins the migration. A daemon that dies of it is no error: that may be what is wanted.
func (j *journey) start(ctx context.Context) error {
	if err := j.machine.judge.begin(ctx, j.machine); err != nil {
		return err
	}
	j.began = time.Now()
	_, err := j.stage.clients[j.from].Start(ctx, &migratedv1.StartRequest{Id: j.id, Spec: j.spec()})
	if status.Code(err) == codes.Unavailable {
		return nil
	}
	return err
}

// view is the migration as the daemon of h shows it; nil where it knows none. An error says that it does not answer.
func (j *journey) view(ctx context.Context, h *lab.Host) (*migratedv1.Migration, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	answer, err := j.stage.clients[h].Get(ctx, &migratedv1.GetRequest{Id: j.id})
	if status.Code(err) == codes.NotFound {
		return nil, nil
	}
	return answer.GetMigration(), err
}

// over says whether the source's daemon calls the migration over.
func (j *journey) over(ctx context.Context) bool {
	m, err := j.view(ctx, j.from)
	return err == nil && m != nil && migration.Terminal(m.GetState())
}

// switched says whether the VM has run at the destination.
func (j *journey) switched() bool { return j.machine.copies.ranOn(j.to, j.began) }

// settle waits until the migration has come to its end, as an operator does who gives the command that migrated prints.
// Nothing is broken any more when it is called. The machine's place is known when it returns nil.
func (j *journey) settle(ctx context.Context) (end string, err error) {
	until := time.Now().Add(patience)
	for {
		if err := j.stage.reviveDaemons(ctx); err != nil {
			return "", err
		}
		end, err = j.look(ctx)
		if err != nil || end != "" {
			break
		}
		if time.Now().After(until) {
			return "", fmt.Errorf("it has not come to an end within %v: %s", patience, j.situation(ctx))
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	if err != nil {
		return "", fmt.Errorf("%w; %s", err, j.situation(ctx))
	}
	j.settled = time.Now()
	j.machine.at = j.from
	if end == endMoved || end == endOrphaned {
		j.machine.at = j.to
	}
	return end, j.tidy(ctx)
}

// look finds out whether the migration is at its end, and gives the command that brings it there.
func (j *journey) look(ctx context.Context) (end string, err error) {
	source, err := j.view(ctx, j.from)
	if err != nil {
		return "", nil //nolint:nilerr // a daemon that is about to end, or has just been started
	}
	destination, err := j.view(ctx, j.to)
	if err != nil {
		return "", nil //nolint:nilerr // likewise
	}
	here, there := j.machine.copies.runs(j.from), j.machine.copies.runs(j.to)
	switch state := source.GetState(); {
	case source == nil: // its daemon was started again and has no record of it
		if here && !there {
			return endStayed, nil
		}
		if there && !j.machine.exists(j.from) && complete(destination) {
			return endMoved, j.foreign(destination)
		}
		return "", nil
	case j.ended && !here && !there && !j.machine.exists(j.to):
		// What the source has kept is of before, and goes, too.
		if ended, err := j.isEnded(ctx); err != nil || !ended || j.machine.exists(j.from) {
			return "", err
		}
		return endEnded, nil
	case j.orphaned && bereft(destination):
		return j.bury(ctx)
	case complete(source):
		if there && complete(destination) {
			return endMoved, j.foreign(source, destination)
		}
		return "", nil
	case !migration.Terminal(state):
		return "", nil
	case here && !there:
		return endStayed, nil
	case !there && await(ctx, eventWithin, func() bool { return j.machine.copies.runs(j.from) }):
		return "", nil // its daemon was faster with the news than its QEMU: look again
	default:
		return j.obey(ctx)
	}
}

// eventWithin is how long the news may take that a QEMU runs its VM, on two busy CPUs.
const eventWithin = 2 * time.Second

// complete says whether a daemon shows that all of the VM is at the destination. One that was started again afterwards
// knows nothing of it: it forgets what is over.
func complete(m *migratedv1.Migration) bool {
	return m == nil || m.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
}

// printed finds the command in what migrated says has to be done.
var printed = regexp.MustCompile(`migrated (fallback|recover) [A-Za-z0-9._-]+( --destination-is-gone| --via [^ ]+)?`)

// obey gives the command that "migrated status" prints for a migration that is over while its VM does not run at the
// source.
func (j *journey) obey(ctx context.Context) (end string, err error) {
	said, err := j.command(ctx, j.from, "status", j.id)
	if err != nil {
		return "", err
	}
	command := printed.FindString(said)
	if !strings.HasPrefix(command, "migrated fallback") {
		return "", fmt.Errorf("the VM does not run at the source, and no command is printed:\n%s", said)
	}
	// The command is for those who are certain that the VM does not run at the destination.
	if j.machine.exists(j.to) {
		if j.switched() {
			return "", fmt.Errorf("the VM may run at the destination, and yet all that the source says is:\n%s", said)
		}
		if err := unlessTooLate(j.machine.kill(ctx, j.to)); err != nil {
			return "", err
		}
		j.note("ended the destination QEMU")
	}
	if _, err := j.command(ctx, j.from, strings.Fields(command)[1:]...); err != nil {
		return "", err
	}
	j.note(command)
	if !await(ctx, 5*time.Second, func() bool { return j.machine.copies.runs(j.from) }) {
		return "", errors.New("it was fallen back to, but does not run")
	}
	return endFellBack, nil
}

// command runs migrated on a host as its operator does, and returns what it prints.
func (j *journey) command(ctx context.Context, h *lab.Host, args ...string) (string, error) {
	binary, err := lab.Binary()
	if err != nil {
		return "", err
	}
	return h.Run(ctx, append([]string{binary}, args...)...)
}

func (j *journey) note(what string) { j.notes = append(j.notes, what) }

const (
	// givenUpWithin is how long a destination may keep a QEMU that is of no use: what it waits for the source's Run.
	givenUpWithin = 75 * time.Second
	// nobodys is how long a QEMU may be there that its daemon does not know, or has ended.
	nobodys = 5 * time.Second
)

// tidy waits until the host that has not got the VM has no QEMU of it any more.
func (j *journey) tidy(ctx context.Context) error {
	empty := j.machine.other(j.machine.at)
	known := time.Now()
	await(ctx, givenUpWithin, func() bool {
		if !j.machine.exists(empty) {
			return true
		}
		if m, err := j.view(ctx, empty); err != nil || m != nil && !migration.Terminal(m.GetState()) {
			known = time.Now()
		}
		return time.Since(known) > nobodys
	})
	if !j.machine.exists(empty) {
		return nil
	}
	if time.Since(known) <= nobodys {
		return fmt.Errorf("a QEMU is left on host %s: %s", empty.Name, j.situation(ctx))
	}
	// Its daemon died before it could write down that it had started it. It cannot run the VM, and the next migration
	// would say that it is in the way, and what to do.
	j.note("ended a QEMU that was left on host " + empty.Name)
	return unlessTooLate(j.machine.kill(ctx, empty))
}

// end forgets what the guest said where it is no more.
func (j *journey) end() error { return j.machine.judge.left(j.machine.other(j.machine.at)) }

// disksAreLater says whether the VM, which runs as it was at the switch, has a disk that it wrote to since then. Nobody
// can hold that against its memory.
func (j *journey) disksAreLater(end string) bool {
	return end == endFellBack && j.switched() && j.machine.config.Disks > 0
}

// check is the verdict: the VM runs once, did so all the time, and its memory and its disks are as they must be.
func (j *journey) check(ctx context.Context, end string) (damage, error) {
	found, err := j.judge(ctx, end)
	if j.disksAreLater(end) {
		found.blocks = 0
	}
	if found.blocks > 0 {
		err = errors.Join(err, fmt.Errorf("%w: %s", report.ErrDisk, found.detail))
	}
	return found, err
}

func (j *journey) judge(ctx context.Context, end string) (damage, error) {
	if err := overlap(j.machine.copies.since(j.began, time.Now())); err != nil {
		return damage{}, err
	}
	if end == endOrphaned || end == endEnded {
		return j.machine.judge.said()
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute+2*bootTime)
	defer cancel()
	client := j.machine.copies.client(j.machine.at)
	if client == nil {
		return damage{}, fmt.Errorf("there is no QEMU where the VM has to be; %s", j.situation(ctx))
	}
	if runs, err := queryRunning(ctx, client); err != nil || !runs {
		return damage{}, fmt.Errorf("the VM does not run where it has to be (%w); %s", err, j.situation(ctx))
	}
	if j.restarted {
		if err := j.awaitBoot(ctx, client); err != nil {
			return damage{}, err
		}
	}
	return j.machine.judge.verify(ctx, j.machine)
}

// awaitBoot waits for a guest that was restarted. TCG of QEMU 7.2 sometimes loses its way while a guest with several
// vCPUs boots (lab.Host.Boot), also where no migration was near; then the VM is reset once more, which does not mend a
// VM that was damaged on its way.
func (j *journey) awaitBoot(ctx context.Context, client *qmp.Client) error {
	err := j.machine.judge.forget(ctx, j.machine)
	if err == nil || ctx.Err() != nil {
		return err
	}
	j.note("its guest hung at its boot, and was reset once more")
	if err := client.Do(ctx, "system_reset", nil, nil); err != nil {
		return err
	}
	return j.machine.judge.forget(ctx, j.machine)
}

// stall is the longest time that the guest was kept from working: stopped, or waiting for memory.
func (j *journey) stall() time.Duration {
	spans := slices.DeleteFunc(j.machine.copies.since(j.began, time.Now()), func(s span) bool {
		return !j.settled.IsZero() && s.from.After(j.settled) // the verdict stops the bare-metal guest
	})
	return max(longestGap(spans), j.machine.judge.stall(j.began))
}

// situation is what everybody says, for an error.
func (j *journey) situation(ctx context.Context) string {
	var says []string
	for _, h := range []*lab.Host{j.from, j.to} {
		role := map[bool]string{true: "source", false: "destination"}[h == j.from]
		m, err := j.view(ctx, h)
		qemu := "no QEMU"
		if j.machine.exists(h) {
			qemu = fmt.Sprintf("a QEMU, running: %v", j.machine.copies.runs(h))
		}
		switch {
		case err != nil:
			says = append(says, fmt.Sprintf("%s %s: its daemon does not answer (%v), %s", role, h.Name, err, qemu))
		case m == nil:
			says = append(says, fmt.Sprintf("%s %s: its daemon knows no migration, %s", role, h.Name, qemu))
		default:
			says = append(says, fmt.Sprintf("%s %s: %v, %d of %d pages, %q, %s", role, h.Name, m.GetState(),
				m.GetProgress().GetPagesPresent(), m.GetProgress().GetPagesTotal(), m.GetError().String(), qemu))
		}
	}
	return strings.Join(says, "; ")
}
