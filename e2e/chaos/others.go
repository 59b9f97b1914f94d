// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// What others than migrated do to a VM while it moves: its guest, its operator, and unrelated processes.

// endEnded: the VM has ended by itself, or by its operator's command.
const endEnded = "ended by itself"

// client returns the host and the QMP connection of the QEMU that runs the VM, or else those at the source.
func (j *journey) client() (*lab.Host, *qmp.Client) {
	h := j.from
	if j.machine.copies.runs(j.to) {
		h = j.to
	}
	return h, j.machine.copies.client(h)
}

// tell gives that QEMU a command. It returns errTooLate without a QEMU, and nil if the QEMU ends because of the
// command.
func (j *journey) tell(ctx context.Context, command string, args any) error {
	_, client := j.client()
	if client == nil {
		return errTooLate
	}
	var gone *qmp.DisconnectedError
	if err := client.Do(ctx, command, args, nil); err != nil && !errors.As(err, &gone) {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// quit ends the VM, as by an operator's mistake. While the VM stands still for the switch, this ends the source's QEMU,
// and memory that is in no file is lost with it.
func (s *stage) quit(f *fault, j *journey) {
	f.begin = func(ctx context.Context) error {
		h, _ := j.client()
		j.ended, j.orphaned = true, h == j.from
		return j.tell(ctx, "quit", nil)
	}
}

// powerOff makes the guest end the VM. A VM that stops at this moment does not hear the command, and is told again.
func (s *stage) powerOff(f *fault, j *journey) {
	say := func(ctx context.Context) error {
		h, _ := j.client()
		return unlessTooLate(j.say(ctx, h, (*report.Port).PowerOff))
	}
	f.begin = func(ctx context.Context) error {
		j.ended = true
		return say(ctx)
	}
	f.end = func(ctx context.Context) error {
		runs := func() bool { return j.machine.copies.runs(j.from) || j.machine.copies.runs(j.to) }
		const tries = 5
		for range tries {
			if await(ctx, 10*time.Second, func() bool { return !runs() && !await(ctx, time.Second, runs) }) {
				return nil
			}
			if err := say(ctx); err != nil {
				return err
			}
		}
		return errors.New("the guest does not power off")
	}
}

// say gives the guest a command by its serial port on h.
func (j *journey) say(ctx context.Context, h *lab.Host, command func(*report.Port) error) error {
	if !j.machine.exists(h) {
		return errNoQEMU
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var log report.Log
	port, err := report.Open(ctx, h.Path(j.machine.path(lab.SerialPath)), &log)
	if err != nil {
		return fmt.Errorf("%w: the guest's serial port: %w", errTooLate, err)
	}
	defer port.Close() // an error means that QEMU has ended before
	if err := command(port); err != nil {
		return err
	}
	// If a client hangs up at once, what QEMU has not read by then is lost.
	select {
	case <-port.Done():
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
	}
	return nil
}

// restart makes the guest begin anew: by the machine's reset, or because its kernel panics. A QEMU that stands still is
// not reset: once its disks are inactive, a reset ends 7.2 (an assertion), and no guest is left to begin anew.
func (s *stage) restart(f *fault, j *journey, kind string) {
	f.begin = func(ctx context.Context) error {
		j.restarted = true
		if kind == panicGuest {
			h, _ := j.client()
			return j.say(ctx, h, (*report.Port).Panic)
		}
		if h, _ := j.client(); !j.machine.copies.runs(h) {
			return errTooLate
		}
		return j.tell(ctx, "system_reset", nil)
	}
}

// continueVM gives cont to a QEMU that migrated keeps from running: the source's, which has stopped for the switch, or
// the destination's, which waits.
func (s *stage) continueVM(f *fault, j *journey, h *lab.Host) {
	f.meanwhile(func(ctx context.Context) error { return j.machine.runner.setRunning(ctx, j.machine, h, true) })
}

// snapshot gives the VM's first disk a new image on top of the present one. The machine is of no use afterwards,
// because its command line names the old image.
func (s *stage) snapshot(f *fault, c chaosCase, j *journey) {
	overlay := j.machine.path(fmt.Sprintf("%s/guest-overlay%d.qcow2", lab.SharedDir, c.Index))
	taken := false
	f.begin = func(ctx context.Context) error {
		h, _ := j.client()
		err := j.machine.runner.snapshot(ctx, j.machine, h, overlay)
		taken = err == nil
		return err
	}
	f.disarm = func(ctx context.Context) error {
		if !taken {
			return nil
		}
		return errors.Join(s.retire(ctx, j.machine), os.Remove(s.lab.Shared(overlay)))
	}
}

// mapRAM maps the VM's RAM in an unrelated process, which reads it over and over: on the host that the VM leaves, from
// before the migration, or on the host that it comes to.
func (s *stage) mapRAM(f *fault, j *journey, r *rand.Rand) {
	h := j.to
	f.detail = "at the destination"
	if r.IntN(3) == 0 {
		h, f.detail = j.from, "at the source"
	}
	over, done := make(chan struct{}), make(chan struct{})
	begun := false
	f.begin = func(context.Context) error {
		memory, err := lab.MapFile(h.Path(j.machine.path(j.machine.config.RAMFiles()[0])))
		if err != nil {
			return fmt.Errorf("%w: %w", errTooLate, err)
		}
		begun, j.mapped = true, true
		go func() {
			defer close(done)
			defer unix.Munmap(memory) //nolint:errcheck // it was mapped
			var sum byte
			for {
				for at := 0; at < len(memory); at += os.Getpagesize() {
					sum += memory[at]
				}
				select {
				case <-over:
					_ = sum
					return
				case <-time.After(100 * time.Millisecond):
				}
			}
		}()
		return nil
	}
	f.disarm = func(context.Context) error {
		if begun {
			close(over)
			<-done
		}
		return nil
	}
}

// isEnded reports whether both daemons have seen that the VM ended, and neither says that it could go on. A
// destination's daemon that was started again can only say that it does not know, if the VM ended before the daemon
// could ask its QEMU whether the VM had ever run there.
func (j *journey) isEnded(ctx context.Context) (bool, error) {
	for _, h := range []*lab.Host{j.from, j.to} {
		m, err := j.view(ctx, h)
		if err != nil || m != nil && !migration.Terminal(m.GetState()) {
			return false, nil //nolint:nilerr // a daemon that is about to end, or has just been started
		}
		if m == nil {
			continue
		}
		said, err := h.Migrated(ctx, "status", j.id)
		if err != nil {
			return false, err
		}
		if printed.MatchString(said) && j.unseen && m.GetLocation() == migratedv1.Location_LOCATION_UNKNOWN {
			j.note("nobody saw how it ended, as status says")
			continue
		}
		if printed.MatchString(said) {
			return false, fmt.Errorf("the VM has ended, and yet host %s says:\n%s", h.Name, said)
		}
	}
	return true, nil
}
