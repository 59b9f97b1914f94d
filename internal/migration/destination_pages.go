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
	// progressInterval is how often the shown figures are updated.
	progressInterval = 100 * time.Millisecond
	// firstBackoff and longestBackoff bound the backoff between two attempts to fetch pages. It doubles with each
	// attempt.
	firstBackoff   = 20 * time.Millisecond
	longestBackoff = time.Second
	// In a long outage the backoff grows further: to 1/outageShare of the time since the last page came, at most
	// outageBackoff. Recover ends the wait.
	outageShare   = 16
	outageBackoff = 30 * time.Second
)

// backoffLimit returns the longest backoff after no page came for the given time.
func backoffLimit(outage time.Duration) time.Duration {
	return min(max(longestBackoff, outage/outageShare), outageBackoff)
}

// nextBackoff returns the backoff after lanes that brought nothing, also if they could be opened: a source that cannot
// read the page that is asked for ends each of them.
func nextBackoff(last, outage time.Duration) time.Duration {
	return min(max(firstBackoff, 2*last), backoffLimit(outage))
}

// pump runs the engine over lanes until the last page is installed. After the switch, it opens new lanes when they
// are lost. When it returns, the destination has ended.
func (d *Destination) pump(first *lanes) {
	defer d.finishAlone() // not earlier: the engine uses the userfaultfd until it returns

	show, stopShowing := context.WithCancel(d.ctx)
	shown := make(chan struct{})
	go func() { defer close(shown); d.showProgress(show) }()
	err := d.pumpLanes(first)
	stopShowing()
	<-shown
	testPoint("destination-filled")
	d.awaitAttached(err)
	d.end(err)
}

// pumpLanes runs the engine over lanes until the last page is installed. If lanes that brought pages are lost, new
// ones are opened at once: on a network that flips bits, lanes do not last. After lanes that brought nothing, it
// waits first.
func (d *Destination) pumpLanes(l *lanes) error {
	came := time.Now() // when the last page came
	for backoff := time.Duration(0); ; {
		if l == nil && d.needsNoSource() {
			return causeOf(d.ctx, d.engine.Run(d.ctx, nil, nil, nil))
		}
		if l == nil {
			var err error
			if l, err = d.dialAgain(); err != nil {
				return err
			}
		}
		before := d.engine.Stats().PagesPresent
		err := d.engine.Run(d.ctx, l.demand, l.bulk, l.openBulk)
		l.close()
		l = nil
		if err == nil {
			return nil
		}
		err = causeOf(d.ctx, err)
		d.cancelLoad(err) // a load under way would wait for its pages in vain
		retry, remedy := d.canRetry(err)
		if d.ctx.Err() != nil || !retry {
			return err
		}
		if d.doom() {
			return fmt.Errorf("the source's pages cannot be fetched any more, before the switch: %w", err)
		}
		d.log.Warn("page transfer has stopped, trying again", "error", err)
		switch {
		case sourceQEMUGone(err):
			d.orphaned(err)
		case !d.orphan: // else the loss of memory stays shown
			d.paused(d.withAbandonRemedy(withRemedy(err, remedy)))
		}
		backoff = nextBackoff(backoff, time.Since(came))
		if d.engine.Stats().PagesPresent != before {
			backoff, came = 0, time.Now()
		}
		if err := d.sleep(backoff); err != nil {
			return err
		}
	}
}

// needsNoSource says whether only the registration is left to be undone, because the VM runs and has all of its memory.
func (d *Destination) needsNoSource() bool {
	stats := d.engine.Stats()
	return d.runAnswer() != nil && stats.PagesPresent == stats.PagesTotal
}

// canRetry says whether pages may come again after an error of the engine, and what an operator can do about it. The
// engine can always go on where it stopped. The VM runs here: giving up would leave it with part of its memory
// permanently. So only an error after which no page can be put where the VM looks for it, or after which the VM may
// read zeros, is final.
func (d *Destination) canRetry(err error) (retry bool, remedy string) {
	again := fmt.Sprintf("; the daemon retries by itself; to retry at once: migrated recover %s", d.cfg.Request.GetId())
	var fork *postcopy.ForkError
	switch {
	case errors.Is(err, postcopy.ErrProcessGone), errors.Is(err, postcopy.ErrMoved), errors.As(err, &fork):
		return false, ""
	case serverSays(err, migratedv1.Reason_REASON_PAGES_UNREADABLE):
		return true, "see the kernel log of the source's host: its memory or the disk behind it is broken, or the file of " +
			"the memory was truncated. All other memory comes first. A thread of the VM that needs what cannot be read " +
			"waits: if it cannot be mended, end the VM here and start it again from its disks" + again
	case errors.Is(err, postcopy.ErrLaneLost):
		return true, "restore the network between the two hosts; the connection is made again by itself"
	case errors.Is(err, postcopy.ErrNoMemory):
		return true, "make room for the VM's memory on the destination" + again
	case errors.Is(err, postcopy.ErrProtocol):
		return true, "make sure that the source's daemon answers there, nothing else, and that it is of this version" + again
	default: // of this host: no descriptor is free, a file cannot be written
		return true, "mend on the destination what the error names" + again
	}
}

// sleep waits about as long as backoff, or until Recover is called or the migration ends.
func (d *Destination) sleep(backoff time.Duration) error {
	if backoff == 0 {
		return nil
	}
	select {
	case <-d.retryNow:
		return nil
	case <-time.After(jitter(backoff)):
		return nil
	case <-d.ctx.Done():
		return context.Cause(d.ctx)
	}
}

// dialAgain opens new lanes, and tries again until it succeeds or the migration ends.
func (d *Destination) dialAgain() (*lanes, error) {
	began := time.Now()
	for backoff := firstBackoff; ; backoff = min(2*backoff, backoffLimit(time.Since(began))) {
		if !d.orphan { // else the loss of memory stays shown, here and below
			d.setState(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER)
		}
		l, err := openLanes(d.ctx, d.laneConfig())
		if err == nil {
			d.engines.reconnects.Add(1)
		}
		if err == nil && d.orphan {
			return l, nil
		}
		if err == nil {
			state := migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
			if !d.toldToRun() { // the migration was taken up between loading and Run
				state = migratedv1.MigrationState_MIGRATION_STATE_DEVICE
			}
			d.update(func(m *migratedv1.Migration) { m.State, m.Error = state, nil })
			return l, nil
		}
		d.log.Warn("the page lanes cannot be opened again", "error", err)
		if !d.orphan {
			d.paused(d.withAbandonRemedy(err))
		}
		if err := d.sleep(backoff); err != nil {
			return nil, err
		}
	}
}

// addresses returns the addresses of the source's page server in the order to try them.
func (d *Destination) addresses() []string {
	d.viaMu.Lock()
	defer d.viaMu.Unlock()
	return append(slices.Clone(d.via), d.cfg.Request.GetPageAddresses()...)
}

// Recover opens a lost connection to the source's pages now, without waiting for the backoff. If via is not empty,
// that address is tried first from now on.
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
	case d.retryNow <- struct{}{}:
	default: // another Recover is pending
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
		d.warnOfOtherProcesses(stats)
		d.update(func(m *migratedv1.Migration) { m.Progress = d.meter.progress(stats) })
	}
}

// shrinkReserve releases reserved memory that installed pages have replaced. It counts all blocks as if they were
// reserved ones, and so holds some megabytes too little.
func (d *Destination) shrinkReserve(stats postcopy.Stats) {
	if d.reserve == nil || stats.PagesTotal == 0 {
		return
	}
	missing := stats.BytesTotal / stats.PagesTotal * (stats.PagesTotal - stats.PagesPresent)
	if err := d.reserve.shrink(missing); err != nil {
		d.log.Warn("memory that was set aside for the VM is not given back before the end", "error", err)
	}
}
