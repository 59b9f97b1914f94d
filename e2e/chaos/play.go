// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A result is how one case ended.
type result struct {
	Index       int           `json:"index"`
	Kind        string        `json:"kind"`
	Case        string        `json:"case"`
	Struck      bool          `json:"struck"` // the fault happened: its moment came before the end
	End         string        `json:"end"`
	Notes       []string      `json:"notes,omitempty"` // what the operator had to do
	Stall       time.Duration `json:"stall_ns"`        // the longest time that the guest was kept from working
	Took        time.Duration `json:"took_ns"`
	Corruptions uint64        `json:"corruptions"` // of memory
	Twice       bool          `json:"twice"`       // two copies ran at once
	Lost        bool          `json:"lost"`        // the VM runs nowhere, and no command that migrated prints helps
	// DiskCorruptions counts blocks that differ from what the guest wrote, and requests that failed.
	DiskCorruptions uint64 `json:"disk_corruptions"`
	// VirshWrong: virsh, on either host, is wrong about the VM, or was for long.
	VirshWrong bool `json:"virsh_wrong"`
	// Orphaned: the VM ended because its source QEMU was killed with memory that was nowhere else and had not crossed.
	Orphaned bool   `json:"orphaned"`
	Failure  string `json:"failure,omitempty"`
}

// play plays one case and judges it. The error is about the suite itself.
func (s *stage) play(ctx context.Context, c chaosCase) (result, error) {
	began := time.Now()
	res := result{Index: c.Index, Kind: c.Kind, Case: c.String()}
	if err := s.issue(); err != nil {
		return res, err
	}
	s.setLink(c.Link)
	var err error
	switch c.Kind {
	case crowd:
		err = s.playCrowd(ctx, c, &res)
	case fullHugePages:
		err = s.playHugePages(ctx, c, &res)
	default:
		err = s.playOne(ctx, c, &res)
	}
	res.Took = time.Since(began)
	return res, err
}

// playOne moves the VM with the Linux guest and plays the case's fault.
func (s *stage) playOne(ctx context.Context, c chaosCase, res *result) error {
	m, err := s.linux(ctx, c.Memory)
	if err != nil {
		return err
	}
	j := s.newJourney(m, fmt.Sprintf("case-%d", c.Index))
	f, err := s.faultOf(c, c.Kind, j)
	if err != nil {
		return err
	}
	if f.detail != "" {
		res.Case += "; " + f.detail
	}
	if err := f.arm(ctx); err != nil {
		return err
	}
	defer s.watchVirsh(ctx, m, res)()
	if res.Struck, err = s.strike(ctx, c, f, j); err != nil {
		return err
	}
	if err := s.restartStopped(ctx, j); err != nil {
		return err
	}
	s.conclude(ctx, j, res)
	s.checkVirsh(ctx, res)
	return f.disarm(ctx)
}

// conclude brings a journey to its end and judges it.
func (s *stage) conclude(ctx context.Context, j *journey, res *result) {
	end, err := j.settle(ctx)
	res.End = end
	defer func() { res.Notes = append(res.Notes, j.notes...) }()
	if err != nil {
		res.Lost = true // no printed command makes it run, and there is nothing else to try
		res.fail(err)
	} else {
		res.Orphaned = end == endOrphaned
		found, err := j.check(ctx, end)
		res.Corruptions += found.pages
		res.DiskCorruptions += found.blocks
		res.fail(err)
		if end == endStayed && j.switched() {
			res.fail(errors.New("the VM has run at the destination, and went on at the source without anybody's word"))
		}
	}
	var twice *twiceError
	if err := overlap(j.machine.copies.since(j.began, time.Now())); errors.As(err, &twice) {
		res.Twice = true
		res.fail(err)
	}
	res.Stall = max(res.Stall, j.stall())
	res.fail(j.end())
	if res.Failure == "" && (end == endOrphaned || end == endEnded || j.restarted || j.disksAreLater(end)) {
		res.fail(s.retire(ctx, j.machine))
	}
}

// fail records the first thing that went wrong; nil is ignored.
func (r *result) fail(err error) {
	if err != nil && r.Failure == "" {
		r.Failure = err.Error()
	}
}

// strike starts the migration, begins the case's fault when its moment has come, and ends it. It reports whether the
// moment came.
func (s *stage) strike(ctx context.Context, c chaosCase, f *fault, j *journey) (bool, error) {
	begun, err := s.plant(c, f, j)
	if err != nil {
		return false, err
	}
	if err := j.start(ctx); err != nil {
		return false, err
	}
	provoked := make(chan error, 1)
	go func() { provoked <- s.provoke(ctx, c.At, j) }()
	struck := s.await(ctx, c.At, j)
	if err := <-provoked; err != nil || !struck {
		return false, errors.Join(err, clearPoints(j.from, j.to))
	}
	if c.At.Point == "" && j.over(ctx) {
		return false, clearPoints(j.from, j.to)
	}
	if !begun {
		err = f.begin(ctx)
	}
	if err == nil {
		err = f.too(ctx)
	}
	if c.At.Point != "" { // the daemon that is held there goes on while the fault lasts
		pause(ctx, time.Duration(c.Pick%300)*time.Millisecond)
	}
	if err := errors.Join(clearPoints(j.from, j.to), unlessTooLate(err)); err != nil {
		return false, err
	}
	pause(ctx, c.For)
	return !errors.Is(err, errTooLate), f.end(ctx)
}

// plant gives the daemons the orders for the points of the case. begun is set if a daemon itself does what the fault
// would do.
func (s *stage) plant(c chaosCase, f *fault, j *journey) (begun bool, err error) {
	if f.guard {
		if err := plant(j.to, find(guardAt), orderHold); err != nil {
			return false, err
		}
	}
	if c.At.Point == "" {
		return false, nil
	}
	p := find(c.At.Point)
	if p.by == byCancel {
		if err := plant(j.from, find(cancelAt), orderHold); err != nil {
			return false, err
		}
	}
	h, order := p.at(j.from, j.to), orderHold
	if len(f.victims) == 1 && f.victims[0] == h {
		order, begun = f.order, true
	}
	return begun, plant(h, p, order)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// longestSetup is how long a migration may take until its moment comes.
const longestSetup = 60 * time.Second

// await returns true when the moment has come, and false when it will not come any more.
func (s *stage) await(ctx context.Context, at moment, j *journey) bool {
	came := false
	look := func() bool {
		switch {
		case at.Point != "":
			p := find(at.Point)
			came = passed(p.at(j.from, j.to), p)
		case at.Switched:
			came = j.switched()
		default:
			came = true
		}
		return came
	}
	next := time.Now()
	await(ctx, longestSetup, func() bool {
		if look() {
			return true
		}
		if time.Now().Before(next) {
			return false
		}
		next = time.Now().Add(100 * time.Millisecond)
		// Points are passed after the end, too. The migration is over when none of it goes on.
		return j.over(ctx) && !await(ctx, time.Second, look)
	})
	if came {
		pause(ctx, time.Until(s.momentOf(at, j)))
	}
	return came
}

// momentOf returns the time of the moment.
func (s *stage) momentOf(at moment, j *journey) time.Time {
	switch {
	case at.Point != "":
		return time.Now()
	case at.Switched:
		return time.Now().Add(at.After)
	default:
		return j.began.Add(at.After)
	}
}

const (
	// cancelAt is the point at which a migration is cancelled.
	cancelAt = "source-stopped"
	// guardAt is the last point before the destination calls the migration complete.
	guardAt = "destination-filled"
)

// provoke brings a migration to a point that it does not pass by itself.
func (s *stage) provoke(ctx context.Context, at moment, j *journey) error {
	if at.Point == "" {
		return nil
	}
	p := find(at.Point)
	switch p.by {
	case byCancel:
		if !await(ctx, longestSetup, func() bool { return passed(j.from, find(cancelAt)) || j.over(ctx) }) {
			return errors.New("the migration does not come to where it is to be cancelled")
		}
		_, err := s.clients[j.from].Cancel(ctx, &migratedv1.CancelRequest{Id: j.id})
		if status.Code(err) == codes.Unavailable { // the fault was quicker
			err = nil
		}
		return errors.Join(err, release(j.from, find(cancelAt)))
	case byStop:
		if err := awaitSwitch(ctx, j); err != nil {
			return err
		}
		h := p.at(j.from, j.to)
		j.stopped = s.daemon(h)
		return s.signalDaemon(h, syscall.SIGTERM)
	case byEnd:
		if err := awaitSwitch(ctx, j); err != nil {
			return err
		}
		j.ended = true
		return unlessTooLate(j.tell(ctx, "quit", nil))
	case byRestart:
		j.unseen = p.name == "destination-taken-up"
		if err := awaitSwitch(ctx, j); err != nil {
			return err
		}
		h := p.at(j.from, j.to)
		if err := s.killDaemon(h); err != nil {
			return err
		}
		// The daemon may die at the point before it answers.
		if err := s.startDaemon(ctx, h); err != nil && !passed(h, p) {
			return err
		}
	}
	return nil
}

func awaitSwitch(ctx context.Context, j *journey) error {
	if !await(ctx, longestSetup, func() bool { return j.switched() || j.over(ctx) }) {
		return errors.New("the VM does not come to run at the destination")
	}
	return nil
}

// restartStopped starts a daemon again that provoke told to stop, when that has ended.
func (s *stage) restartStopped(ctx context.Context, j *journey) error {
	if j.stopped == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, stopping)
	defer cancel()
	select {
	case <-j.stopped.Exited():
		return s.reviveDaemons(ctx)
	case <-ctx.Done():
		return fmt.Errorf("the daemon of host %s does not end within %v after SIGTERM", j.from.Name, stopping)
	}
}
