// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"fmt"
	"sync"
)

const (
	// Watchers is the most calls at once that follow a host's list of migrations.
	Watchers = 128
	// WatchersPerCaller is the most such calls of one caller: a name in a certificate, an address, or all users of the
	// Unix socket together.
	WatchersPerCaller = 32
)

// Seats limits long calls, in total and for each caller.
type Seats struct {
	most, mostOfOne int

	mu    sync.Mutex
	taken map[string]int // by caller
	all   int
}

// NewSeats returns Seats for most calls at once, and for mostOfOne calls of one caller.
func NewSeats(most, mostOfOne int) *Seats {
	return &Seats{most: most, mostOfOne: mostOfOne, taken: make(map[string]int)}
}

// Take takes a seat for a call of a caller. The call ends with leave, which may be called repeatedly. The error says
// why there is no seat.
func (s *Seats) Take(caller string) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.taken[caller] >= s.mostOfOne:
		return nil, fmt.Errorf("this caller has %d such calls under way, the most it may have; end one of them", s.mostOfOne)
	case s.all >= s.most:
		return nil, fmt.Errorf("%d such calls are under way, the most this daemon serves; try again later", s.most)
	}
	s.taken[caller]++
	s.all++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.all--
		if s.taken[caller]--; s.taken[caller] == 0 {
			delete(s.taken, caller)
		}
	}), nil
}
