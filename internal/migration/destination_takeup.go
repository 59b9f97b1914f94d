// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// KeptDirs are the directories below dir, one a migration to this host, in which
// an earlier run of the daemon left one that had not ended.
func KeptDirs(dir string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", keptFacts))
	for i := range files {
		files[i] = filepath.Dir(files[i])
	}
	return files, err
}

// RemoveDir removes the directory of a migration to this host that is over, with its logs. One that holds what a later
// daemon is to take up stays.
func RemoveDir(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, keptFacts)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(dir)
}

// RemoveEnded does so with all directories below dir: nobody is told of those migrations any more, and each attempt of a
// peer left one.
func RemoveEnded(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, RemoveDir(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// TakeUpDestination goes on with the migration that an earlier run of this
// daemon left in cfg.Dir; cfg has no Request. QEMU kept its copy of the
// userfaultfd open: what needs a missing page has waited since. A VM that was
// not told to run goes on at the source, unless that says Run yet.
func TakeUpDestination(ctx context.Context, cfg DestinationConfig) (*Destination, error) {
	k, facts, request, err := takeUpKept(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("take up the migration kept in %s: %w", cfg.Dir, err)
	}
	cfg.Request = request
	d := NewDestination(ctx, cfg)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.kept, d.facts, d.left = k, facts, facts.QEMU
	d.noteTakenUp(k.header().ended.Load() != 0 || k.header().filled.Load() != 0)
	if libvirt.IsAddress(facts.QMP) {
		d.domain = facts.QMP
	}
	if k.header().toldToRun.Load() != 0 {
		d.phase = running
		d.decide(toldToRun)
		d.knowAnswer()
	}
	reached("destination-taken-up")
	if reason := k.header().ended.Load(); reason != 0 { // its source may ask how it ended
		d.showEnded(endingKept(migratedv1.Reason(reason)))
		d.cancel(nil)
		d.release()
		close(d.done)
		return d, nil
	}
	if k.header().filled.Load() != 0 { // nothing waits for it; its source may ask how it ended
		d.log.Info("taking up a migration of which all memory is here", "switched", d.phase == running)
		d.takeUpFilled(facts)
		return d, nil
	}
	d.log.Warn("taking up a migration that an earlier run of this daemon left", "switched", d.phase == running)
	if err := d.takeUp(facts); err != nil {
		d.notTakenUp(facts, err)
		return d, nil
	}
	switch d.phase {
	case running:
		// Without an answer QEMU has to be told again, and the migration must not be over before.
		if d.answer != nil {
			d.engine.StartSweep()
		}
	default:
		d.phase = loaded
		d.expire(loaded, loadedTimeout, "the source did not say go")
	}
	d.supervision, d.label = facts.Supervision, facts.Label
	d.update(func(m *migratedv1.Migration) {
		m.Supervision, m.UserfaultfdLabel = shownSupervision[d.supervision], d.label
		m.State = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
		m.Prepared = true
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	d.pumping = true
	d.attaching = make(chan struct{})
	go d.pump(nil)
	go d.attachAgain(facts)
	return d, nil
}

// takeUp lets pages flow again. It asks QEMU nothing: its main loop may be
// what waits for a page.
func (d *Destination) takeUp(facts *keptFactsV1) (err error) {
	if !facts.QEMU.Alive() {
		return errQEMUGone
	}
	if err := claimed.take(facts.QEMU, d.cfg.Request.GetId()); err != nil {
		return err
	}
	d.claim = facts.QEMU
	if d.phase != running && d.kept.header().loaded.Load() == 0 {
		return errors.New("the device state had not arrived")
	}
	if d.taken, err = inject.Duplicate(facts.QEMU.PID, facts.RemoteFD); err != nil {
		return fmt.Errorf("take the userfaultfd from the destination QEMU again: %w", err)
	}
	return d.makeEngine(facts)
}

// takeUpFilled ends a migration whose memory was all here. The caller holds mu.
func (d *Destination) takeUpFilled(facts *keptFactsV1) {
	progress := &migratedv1.Progress{Downtime: durationpb.New(time.Duration(d.kept.header().downtime.Load()))}
	for _, b := range facts.Blocks {
		progress.BytesTotal += b.Size
		progress.PagesTotal += b.Size / b.PageSize
	}
	progress.PagesPresent = progress.GetPagesTotal()
	d.update(func(m *migratedv1.Migration) {
		m.State, m.Prepared, m.Progress = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, true, progress
		m.Location = migratedv1.Location_LOCATION_DESTINATION
	})
	if d.kept.header().settled.Load() != 0 {
		d.cancel(nil)
		d.release()
		close(d.done)
		return
	}
	go func() {
		defer close(d.done)
		defer d.release()
		defer d.cancel(nil)
		vm, err := attachTo(d.ctx, facts)
		if err != nil { // it may have ended since, as any VM may; else see putBackLater
			d.log.Warn("QEMU's settings are not put back yet", "error", err)
			return
		}
		d.closeRemote(facts.QEMU.PID, facts.RemoteFD)
		vm.PutBack(facts.Settings)
		d.mu.Lock()
		d.vm = vm
		d.mu.Unlock()
	}()
}

// attachAgain connects to QEMU's monitor as soon as QEMU answers.
func (d *Destination) attachAgain(facts *keptFactsV1) {
	defer close(d.attaching)
	for {
		vm, err := attachTo(d.ctx, facts)
		if err == nil {
			d.noteQEMU(vm.QMP.Version())
			vm.PutBack(facts.Settings)
			d.mu.Lock()
			d.vm = vm
			d.mu.Unlock()
			go d.watchQEMU(vm)
			return
		}
		if !facts.QEMU.Alive() {
			d.cancel(errQEMUGone)
			return
		}
		d.log.Warn("the destination QEMU does not answer yet", "error", err)
		if sleep(d.ctx, time.Second) != nil {
			return
		}
	}
}

// awaitAttached returns when attachAgain has ended. With all memory in, QEMU answers unless its monitor is
// somebody else's; after a failure it need not.
func (d *Destination) awaitAttached(failure error) {
	if d.attaching == nil {
		return
	}
	if failure == nil {
		select {
		case <-d.attaching:
			return
		case <-time.After(closeTimeout):
			failure = errors.New("QEMU's monitor does not answer")
		}
	}
	d.cancel(failure)
	<-d.attaching
}

// errQEMUGone is why a migration that was left is over.
var errQEMUGone = errors.New("the destination QEMU ended while no daemon ran")

// notTakenUp ends a migration that cannot go on. The caller holds mu.
func (d *Destination) notTakenUp(facts *keptFactsV1, err error) {
	err = fmt.Errorf("%w: %w", errDaemonEnded, err)
	if d.phase != running {
		d.giveUp(err)
		return
	}
	// The files stay, and with them the chance that the next start finds the cause removed.
	d.leave = facts.QEMU.Alive()
	d.log.Error("cannot take up the migration", "error", err)
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
		withRemedy(err, "remove the cause and restart this daemon; what needs a missing page waits until then"),
		d.whereFailed())
	d.cancel(err)
	d.release()
	close(d.done)
}

// knowAnswer finds out what Run was answered, or would have been: while it is
// nil, Run tells QEMU again. A VM that ended by itself has run, and the source
// hears how it ended when it asks for more. The caller holds mu.
func (d *Destination) knowAnswer() {
	h := d.kept.header()
	at := h.resumed.Load()
	if at == 0 && h.ended.Load() == 0 {
		return
	}
	d.answer = &migratedv1.RunResponse{
		ResumeTime: durationpb.New(time.Duration(h.resumeTime.Load())), ServeTime: durationpb.New(0),
	}
	if at != 0 {
		d.meter.switched(time.Unix(0, at), time.Duration(h.downtime.Load()))
	}
}
