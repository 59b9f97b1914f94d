// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A specification may limit how long the migration as a whole takes:
//
//	prepare_limit  from the moment at which preparing begins               until it is prepared
//	switch_limit   from then, or from Start where that comes later         until the commit
//	freeze_limit   from the VM's stop (see giveVM)                         until the destination is told to run it
//	total_limit    as switch_limit                                         until all memory is at the destination
//
// Preparing begins with startLimits, in Source.run. If a limit passes before the commit, the migration is given up, as
// by Cancel. If total_limit passes after it, the migration goes on and is marked as overdue.

// errLimitMissed is why a migration that exceeded one of its limits was given up. It has its Reason from the beginning,
// because an error that ends with it may have another one, of a call that it broke off, behind it.
var errLimitMissed = withReason(errors.New("the migration exceeded its limit"), migratedv1.Reason_REASON_LIMIT_MISSED)

// limitMissed returns the error for a limit that has passed. name is the limit's field, what is the step that was not
// done in time.
func limitMissed(name string, limit *durationpb.Duration, what, remedy string) error {
	return withRemedy(fmt.Errorf("%w: %s: it was not %s within %v", errLimitMissed, name, what, limit.AsDuration()),
		remedy)
}

// startLimits starts the clocks of the specification's limits, which run until the migration is over. The caller calls
// prepared when the migration is prepared; that ends prepare_limit.
func (s *Source) startLimits(ctx context.Context) (prepared func()) {
	s.prepareBegan = time.Now()
	spec := s.cfg.Spec
	if spec.GetPrepareLimit() == nil && spec.GetSwitchLimit() == nil && spec.GetTotalLimit() == nil {
		return func() {}
	}
	ready := make(chan struct{})
	go s.enforceLimits(ctx, ready)
	return func() { close(ready) }
}

// enforceLimits waits for the limits, and gives the migration up or marks it as overdue when one passes.
func (s *Source) enforceLimits(ctx context.Context, prepared <-chan struct{}) {
	spec, started := s.cfg.Spec, s.started
	prepare := limitTimer(spec.GetPrepareLimit(), s.prepareBegan)
	var switchOver, total <-chan time.Time
	for {
		select {
		case <-prepared:
			prepared, prepare = nil, nil
		case <-started:
			started = nil
			switchOver = limitTimer(spec.GetSwitchLimit(), s.limitsStart())
			total = limitTimer(spec.GetTotalLimit(), s.limitsStart())
		case <-prepare:
			s.giveUpForLimit(limitMissed("prepare_limit", spec.GetPrepareLimit(), "prepared",
				"see what took so long, in the logs of both daemons; or give it more time (--prepare-limit)"))
		case <-switchOver:
			s.giveUpForLimit(limitMissed("switch_limit", spec.GetSwitchLimit(), "handed over",
				"migrate it again, or give it more time (--switch-limit)"))
		case <-total:
			if !s.giveUpForLimit(limitMissed("total_limit", spec.GetTotalLimit(), "at the destination with all of its memory",
				"migrate it again, or give it more time (--total-limit)")) {
				s.markOverdue()
			}
		case <-ctx.Done():
			return
		}
	}
}

// limitTimer returns a channel that delivers when limit has passed since from; nil, which never delivers: there is no
// limit.
func limitTimer(limit *durationpb.Duration, from time.Time) <-chan time.Time {
	if limit == nil {
		return nil
	}
	return time.After(time.Until(from.Add(limit.AsDuration())))
}

// limitsStart returns when switch_limit and total_limit began to count. The migration was started.
func (s *Source) limitsStart() time.Time {
	if s.startedAt.After(s.prepareBegan) {
		return s.startedAt
	}
	return s.prepareBegan
}

// totalDeadline returns when all memory has to be at the destination; the zero time: there is no limit. The migration
// was started.
func (s *Source) totalDeadline() time.Time {
	if s.cfg.Spec.GetTotalLimit() == nil {
		return time.Time{}
	}
	return s.limitsStart().Add(s.cfg.Spec.GetTotalLimit().AsDuration())
}

// untilTotalDeadline returns how long it is until totalDeadline; nil: there is no limit. The destination is told a
// duration and not a time, because its clock may differ.
func (s *Source) untilTotalDeadline() *durationpb.Duration {
	if s.totalDeadline().IsZero() {
		return nil
	}
	return durationpb.New(time.Until(s.totalDeadline()))
}

// giveUpForLimit gives the migration up because a limit has passed. If the VM is handed over, it only notes the limit
// and returns false. If the VM comes back to the source afterwards, clearing the commit gives the migration up for that
// limit.
func (s *Source) giveUpForLimit(limit error) bool {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.isCommitted() {
		s.missedLimit = limit
		return false
	}
	s.cancel(limit)
	return true
}

// markOverdue marks and logs a migration whose total_limit has passed after the commit.
func (s *Source) markOverdue() {
	if s.showOverdue() {
		s.log.Warn("overdue: the VM is handed over, and not all memory has left within the limit",
			"total_limit", s.cfg.Spec.GetTotalLimit().AsDuration())
	}
}

// showOverdue marks the migration as overdue if it was switched over and is not over yet. It returns whether it did.
func (t *Tracker) showOverdue() (is bool) {
	t.update(func(m *migratedv1.Migration) {
		is = m.GetSwitchTime() != nil && !Terminal(m.GetState())
		m.Overdue = m.Overdue || is
	})
	return is
}

// takeUpTotalLimit watches total_limit of a migration that was taken up after the commit. due is when it passes; zero:
// never.
func (s *Source) takeUpTotalLimit(ctx context.Context, due time.Time) {
	if due.IsZero() {
		return
	}
	go func() {
		if sleep(ctx, time.Until(due)) == nil {
			s.markOverdue()
		}
	}()
}

// setDeadline keeps and watches the time by which all memory is to be here. left is how long that is from now, as the
// source has just sent it; nil: there is no limit. The caller holds mu.
func (d *Destination) setDeadline(left *durationpb.Duration) {
	if left == nil {
		return
	}
	due := time.Now().Add(min(left.AsDuration(), longestTotal))
	d.kept.header().due.Store(due.UnixNano())
	d.watchDeadline(due)
}

// watchDeadline marks the migration as overdue at due, if it is not over by then.
func (d *Destination) watchDeadline(due time.Time) {
	go func() {
		if sleep(d.ctx, time.Until(due)) == nil && d.showOverdue() {
			d.log.Warn("overdue: the VM is here, and not all of its memory has come within the limit",
				"total_limit", d.cfg.Request.GetSpec().GetTotalLimit().AsDuration())
		}
	}()
}

// deadlinePassed reports whether the kept due time has passed. The caller holds mu.
func (d *Destination) deadlinePassed() bool {
	due := d.kept.header().due.Load()
	return due != 0 && time.Now().UnixNano() > due
}
