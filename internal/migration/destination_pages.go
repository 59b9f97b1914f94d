// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// progressInterval is how often figures are brought up to date.
	progressInterval = 100 * time.Millisecond
	// firstPause and longestPause bound what is waited between two attempts to have pages again: each time twice as long.
	firstPause   = 20 * time.Millisecond
	longestPause = time.Second
	// What waits for hours may wait a little longer: a pause grows to this share of the time since pages came last, and to
	// lastingPause. An operator may hurry it (Recover).
	pauseShare   = 16
	lastingPause = 30 * time.Second
)

// pauseAfter is the longest pause between two attempts when it is so long that nothing came.
func pauseAfter(vain time.Duration) time.Duration {
	return min(max(longestPause, vain/pauseShare), lastingPause)
}

// pump drives the engine over lanes until the last page is in, opening new
// lanes when they are lost after the switch. It ends the destination's life.
func (d *Destination) pump(first *lanes) {
	defer close(d.done)
	defer d.release() // not before: the engine uses the descriptor until it returns
	defer d.cancel(nil)

	show, stopShowing := context.WithCancel(d.ctx)
	shown := make(chan struct{})
	go func() { defer close(shown); d.showProgress(show) }()
	err := d.pumpLanes(first)
	stopShowing()
	<-shown
	reached("destination-filled")
	d.awaitAttached(err)
	d.end(err)
}

// pumpLanes does so. A session that brought pages is followed by the next one at once: where bits flip on the way, it does
// not last. A pause comes after one that was in vain.
func (d *Destination) pumpLanes(l *lanes) error {
	came := time.Now() // pages
	for pause := time.Duration(0); ; {
		if l == nil {
			var err error
			if l, err = d.dialAgain(); err != nil {
				return err
			}
		}
		before := d.engine.Stats().PagesPresent
		err := d.engine.Run(d.ctx, l.demand, l.bulk)
		l.close()
		l = nil
		if err == nil {
			return nil
		}
		err = causeOf(d.ctx, err)
		d.cancelLoad(err) // a load under way would wait for its pages in vain
		passes, remedy := d.mayPass(err)
		if d.ctx.Err() != nil || !passes {
			return err
		}
		if d.decide(cannotRun) {
			return fmt.Errorf("the source's pages cannot be had any more, before the switch: %w", err)
		}
		d.log.Warn("no page comes any more, trying again", "error", err)
		switch {
		case sourceQEMUGone(err):
			d.orphaned(err)
		case !d.orphan: // else that is shown still
			d.paused(d.orAbandon(withRemedy(err, remedy)))
		}
		switch inVain := d.engine.Stats().PagesPresent == before; {
		case !inVain:
			pause, came = 0, time.Now()
		case !d.orphan && errors.Is(err, postcopy.ErrLaneLost):
			pause = firstPause // the network mends itself, and dialAgain has pauses of its own
		default:
			pause = min(max(firstPause, 2*pause), pauseAfter(time.Since(came)))
		}
		if err := d.sleep(pause); err != nil {
			return err
		}
	}
}

// mayPass says whether pages may come again after an error of the engine, which is always able to go on where it was,
// and what an operator can do about it. The VM runs here: to give up would leave it half of its memory for good.
func (d *Destination) mayPass(err error) (passes bool, remedy string) {
	again := fmt.Sprintf("; it is tried again by itself, and at once by: migrated recover %s", d.cfg.Request.GetId())
	switch {
	case errors.Is(err, postcopy.ErrLaneLost):
		return true, "restore the network between the two hosts; the connection is made again by itself"
	case errors.Is(err, postcopy.ErrNoMemory):
		return true, "make room for the VM's memory on the destination" + again
	case errors.Is(err, postcopy.ErrProtocol):
		return true, "see that nothing but the source's daemon answers there, and that it is of this version" + again
	default:
		return false, ""
	}
}

// sleep waits about so long, or until somebody is impatient.
func (d *Destination) sleep(pause time.Duration) error {
	if pause == 0 {
		return nil
	}
	select {
	case <-d.hurry:
		return nil
	case <-time.After(jitter(pause)):
		return nil
	case <-d.ctx.Done():
		return context.Cause(d.ctx)
	}
}

// dialAgain tries to open lanes until it has some.
func (d *Destination) dialAgain() (*lanes, error) {
	began := time.Now()
	for pause := firstPause; ; pause = min(2*pause, pauseAfter(time.Since(began))) {
		if !d.orphan { // else what is shown stays true, here and below
			d.setState(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER)
		}
		l, err := openLanes(d.ctx, d.laneConfig())
		if err == nil {
			d.counted.reconnects.Add(1)
		}
		if err == nil && d.orphan {
			return l, nil
		}
		if err == nil {
			state := migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
			if d.fate.Load() != toldToRun { // taken up between loading and Run
				state = migratedv1.MigrationState_MIGRATION_STATE_DEVICE
			}
			d.update(func(m *migratedv1.Migration) { m.State, m.Error = state, nil })
			return l, nil
		}
		d.log.Warn("the page lanes cannot be opened again", "error", err)
		if !d.orphan {
			d.paused(d.orAbandon(err))
		}
		if err := d.sleep(pause); err != nil {
			return nil, err
		}
	}
}

// addresses are those of the source's page server, best first.
func (d *Destination) addresses() []string {
	d.viaMu.Lock()
	defer d.viaMu.Unlock()
	return append(slices.Clone(d.via), d.cfg.Request.GetPageAddresses()...)
}

// Recover makes the connection to the source's pages again now, where it is lost, and from now on at the address via
// first, if that is not empty.
func (d *Destination) Recover(via string) error {
	if view, _ := d.Snapshot(); Terminal(view.GetState()) {
		return errors.New("this migration is over")
	}
	if via != "" {
		d.viaMu.Lock()
		d.via = slices.Insert(slices.DeleteFunc(d.via, func(old string) bool { return old == via }), 0, via)
		d.viaMu.Unlock()
	}
	select {
	case d.hurry <- struct{}{}:
	default: // somebody was as impatient
	}
	return nil
}

func (d *Destination) paused(reason error) {
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED, reason, d.whereWaiting())
}

func (d *Destination) showProgress(ctx context.Context) {
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		stats := d.engine.Stats()
		d.shrinkReserve(stats)
		d.warnOfOthers(stats)
		d.update(func(m *migratedv1.Migration) { m.Progress = d.meter.progress(stats) })
	}
}

// shrinkReserve gives back what the pages that came have taken the place of. Those of other blocks are counted as if
// they were of promised memory: it is too little that is held then, by some megabytes.
func (d *Destination) shrinkReserve(stats postcopy.Stats) {
	if d.reserve == nil || stats.PagesTotal == 0 {
		return
	}
	missing := stats.BytesTotal / stats.PagesTotal * (stats.PagesTotal - stats.PagesPresent)
	if err := d.reserve.keep(missing); err != nil {
		d.log.Warn("memory that was set aside for the VM is not given back before the end", "error", err)
	}
}
