// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// leap is how far the clock jumps, ahead and back; stays is how long it stays there.
const (
	leap  = 3 * 365 * 24 * time.Hour
	stays = 5 * time.Millisecond
)

// whileClockJumps calls do while this machine's clock is set years ahead, years back, and right, in turns. The clock is
// right again afterwards. jumped says that the clock could not be set.
func whileClockJumps(ctx context.Context, do func() error) (done, jumped error) {
	began := time.Now()
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		var errs []error
		jumps := 0
		for ; ctx.Err() == nil; jumps++ {
			errs = append(errs, setClock(began, []time.Duration{leap, -leap, 0}[jumps%3]))
			time.Sleep(stays)
		}
		if jumps < 3 {
			errs = append(errs, fmt.Errorf("it jumped %d times", jumps))
		}
		logf("the clock jumped %d times", jumps)
		ended <- errors.Join(append(errs, setClock(began, 0))...)
	}()
	done = do()
	stop()
	return done, <-ended
}

// setClock sets the clock off from the right time, which it takes from the monotonic clock.
func setClock(began time.Time, off time.Duration) error {
	ts := unix.NsecToTimespec(began.Add(time.Since(began)).Round(0).Add(off).UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}
