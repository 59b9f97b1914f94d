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
	unseen   bool     // the destination's daemon was started again, and had not asked QEMU by then
	mapped   bool     // an unrelated process maps its RAM
	// restarted is set if its guest has begun anew and knows nothing of the time before.
	restarted bool
	// stopped is a daemon that the case told to stop and must start again; nil: none.
	stopped *lab.Process
}

// The ends of a journey.
const (
	endMoved    = "moved"     // the VM runs at the destination, all of it
	endStayed   = "stayed"    // the VM runs at the source, as if nothing had been
	endFellBack = "fell back" // the VM runs at the source, as it was at the switch
	// endOrphaned: the source QEMU ended with memory that was nowhere else, and its operator has ended the VM.
	endOrphaned = "lost because its source QEMU was killed"
)

// patience bounds how long a migration may take to end after the fault has ended. A source repeats the hand-over with
// pauses, TCP waits for twice as long as a network was cut, and a destination that is not told to run gives up after a
// minute.
const patience = 150 * time.Second

func (s *stage) newJourney(m *machine, id string) *journey {
	return &journey{stage: s, machine: m, from: m.at, to: m.lab.Other(m.at), id: id}
}

func (j *journey) spec() *migratedv1.MigrationSpec {
	return &migratedv1.MigrationSpec{Vm: j.machine.runner.address(j.machine), Destination: j.to.DaemonAddr()}
}

// start begins the migration. It is no error if the daemon dies of it, because the case may want that.
func (j *journey) start(ctx context.Context) error {
	if err := j.machine.checker.begin(ctx, j.machine); err != nil {
		return err
	}
	j.began = time.Now()
	_, err := j.stage.clients[j.from].Start(ctx, &migratedv1.StartRequest{Id: j.id, Spec: j.spec()})
	if status.Code(err) == codes.Unavailable {
		return nil
	}
	return err
}

// view returns the migration as the daemon of h shows it; nil if the daemon knows none. An error says that the daemon
// does not answer.
func (j *journey) view(ctx context.Context, h *lab.Host) (*migratedv1.Migration, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	answer, err := j.stage.clients[h].Get(ctx, &migratedv1.GetRequest{Id: j.id})
	if status.Code(err) == codes.NotFound {
		return nil, nil
	}
	return answer.GetMigration(), err
}

// over reports whether the source's daemon calls the migration over.
func (j *journey) over(ctx context.Context) bool {
	m, err := j.view(ctx, j.from)
	return err == nil && m != nil && migration.Terminal(m.GetState())
}

// switched reports whether the VM has run at the destination.
func (j *journey) switched() bool { return j.machine.copies.ranOn(j.to, j.began) }

// settle waits until the migration has ended. Like an operator, it gives the command that migrated prints. It is called
// after the fault has ended. If it returns nil, the machine's host is known.
func (j *journey) settle(ctx context.Context) (end string, err error) {
	until := time.Now().Add(patience)
	for {
		if err := j.stage.reviveDaemons(ctx); err != nil {
			return "", err
		}
		end, err = j.look(ctx)
		late := time.Now().After(until)
		if end != "" || err != nil && (late || !errors.Is(err, errNoRemedy)) {
			break
		}
		if late {
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

// look finds out whether the migration has ended, and gives the command that ends it.
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
	case j.ended && !here && !there && !j.machine.exists(j.to):
		// What the source has kept is from before the switch, and must go, too.
		if ended, err := j.isEnded(ctx); err != nil || !ended || j.machine.exists(j.from) {
			return "", err
		}
		return endEnded, nil
	case source == nil: // its daemon was started again and has no record of it
		if here && !there {
			return endStayed, nil
		}
		if there && !j.machine.exists(j.from) && complete(destination) {
			return endMoved, j.foreign(destination)
		}
		return "", nil
	case j.orphaned && memoryLost(destination):
		return j.endLostVM(ctx)
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
		return "", nil // the daemon's news came before its QEMU's: look again
	default:
		return j.followRemedy(ctx)
	}
}

// eventWithin is how long the event that a QEMU runs its VM may usually take, on two busy CPUs.
const eventWithin = 2 * time.Second

// errNoRemedy says that no command is printed for a VM that does not run. It is final after patience: the event that
// the VM runs may still come.
var errNoRemedy = errors.New("no remedy")

// complete reports whether a daemon shows that all of the VM is at the destination. A daemon that was started again
// afterwards shows nothing, because it forgets migrations that are over.
func complete(m *migratedv1.Migration) bool {
	return m == nil || m.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
}

// printed matches the command in what migrated says has to be done.
var printed = regexp.MustCompile(`migrated (fallback|recover) [A-Za-z0-9._-]+( --destination-is-gone| --via [^ ]+)?`)

// followRemedy gives the command that "migrated status" prints for a migration that is over and whose VM does not run
// at the source.
func (j *journey) followRemedy(ctx context.Context) (end string, err error) {
	said, err := j.from.Migrated(ctx, "status", j.id)
	if err != nil {
		return "", err
	}
	command := printed.FindString(said)
	if !strings.HasPrefix(command, "migrated fallback") {
		return "", fmt.Errorf("%w: the VM does not run at the source, and no command is printed:\n%s", errNoRemedy, said)
	}
	// The command is for an operator who is certain that the VM does not run at the destination.
	if j.machine.exists(j.to) {
		if j.switched() {
			return "", fmt.Errorf("the VM may run at the destination, and yet all that the source says is:\n%s", said)
		}
		if err := unlessTooLate(j.machine.kill(ctx, j.to)); err != nil {
			return "", err
		}
		j.note("ended the destination QEMU")
	}
	if _, err := j.from.Migrated(ctx, strings.Fields(command)[1:]...); err != nil {
		return "", err
	}
	j.note(command)
	if !await(ctx, patience, func() bool { return j.machine.copies.runs(j.from) }) {
		return "", errors.New("it was fallen back to, but does not run")
	}
	return endFellBack, nil
}

func (j *journey) note(what string) { j.notes = append(j.notes, what) }

const (
	// givenUpWithin is how long a destination may keep a useless QEMU: the time for which it waits for the source's Run.
	givenUpWithin = 75 * time.Second
	// nobodys is how long a QEMU may exist that its daemon does not know, or has ended.
	nobodys = 5 * time.Second
)

// tidy waits until the host without the VM has no QEMU of it any more.
func (j *journey) tidy(ctx context.Context) error {
	empty := j.stage.lab.Other(j.machine.at)
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
	// Its daemon died before it could record that it had started the QEMU. That QEMU cannot run the VM, and the next
	// migration would say that it is in the way, and what to do.
	j.note("ended a QEMU that was left on host " + empty.Name)
	return unlessTooLate(j.machine.kill(ctx, empty))
}

// end forgets what the guest said on the host where it is no more.
func (j *journey) end() error { return j.machine.checker.left(j.stage.lab.Other(j.machine.at)) }

// disksAreLater reports whether the VM runs as it was at the switch, but has a disk to which it wrote after that. The
// disk then differs from the memory for a good reason.
func (j *journey) disksAreLater(end string) bool {
	return end == endFellBack && j.switched() && j.machine.config.Disks > 0
}

// check gives the verdict: the VM runs once, did so all the time, and its memory and its disks are as they must be.
func (j *journey) check(ctx context.Context, end string) (damage, error) {
	found, err := j.checkVM(ctx, end)
	if j.disksAreLater(end) {
		found.blocks = 0
	}
	if found.blocks > 0 {
		err = errors.Join(err, fmt.Errorf("%w: %s", report.ErrDisk, found.detail))
	}
	return found, err
}

func (j *journey) checkVM(ctx context.Context, end string) (damage, error) {
	if err := overlap(j.machine.copies.since(j.began, time.Now())); err != nil {
		return damage{}, err
	}
	if end == endOrphaned || end == endEnded {
		return j.machine.checker.said()
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute+2*bootTime)
	defer cancel()
	client := j.machine.copies.client(j.machine.at)
	if client == nil {
		return damage{}, fmt.Errorf("there is no QEMU where the VM has to be; %s", j.situation(ctx))
	}
	if runs, err := lab.Runs(ctx, client); err != nil || !runs {
		return damage{}, fmt.Errorf("the VM does not run where it has to be (%w); %s", err, j.situation(ctx))
	}
	if j.restarted {
		if err := j.awaitBoot(ctx, client); err != nil {
			return damage{}, err
		}
	}
	return j.machine.checker.verify(ctx, j.machine)
}

// awaitBoot waits for a guest that was restarted. TCG of QEMU 7.2 sometimes hangs while a guest with several vCPUs
// boots (lab.Host.Boot), also without any migration. Then the VM is reset once more, which would not mend a VM that was
// damaged on its way.
func (j *journey) awaitBoot(ctx context.Context, client *qmp.Client) error {
	err := j.machine.checker.forget(ctx, j.machine)
	if err == nil || ctx.Err() != nil {
		return err
	}
	j.note("its guest hung at its boot, and was reset once more")
	if err := client.Do(ctx, "system_reset", nil, nil); err != nil {
		return err
	}
	return j.machine.checker.forget(ctx, j.machine)
}

// stall returns the longest time that the guest was kept from working: stopped, or waiting for memory.
func (j *journey) stall() time.Duration {
	spans := slices.DeleteFunc(j.machine.copies.since(j.began, time.Now()), func(s span) bool {
		return !j.settled.IsZero() && s.from.After(j.settled) // after that, the verdict stops the bare-metal guest
	})
	return max(longestGap(spans), j.machine.checker.stall(j.began))
}

// situation describes what both hosts show, for an error.
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
