// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// leap is by how much the clock jumps, there and back, and every how many milliseconds.
const (
	leap  = 3 * 365 * 24 * time.Hour
	stays = 5 * time.Millisecond
)

// whileClockJumps does something while this machine's clock is put years ahead, years back, and right, in turns. It
// is right again afterwards. The error says that the clock was not put anywhere.
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

// setClock puts the clock so far from what the monotonic clock says that it is.
func setClock(began time.Time, off time.Duration) error {
	ts := unix.NsecToTimespec(began.Add(time.Since(began)).Round(0).Add(off).UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}
