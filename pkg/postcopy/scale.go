// SPDX-License-Identifier: Apache-2.0

package postcopy

// scale decides how many bulk lanes the sweep uses.
//
// One lane is one connection and one thread at each host. One lane limits the sweep where the network carries more than
// a processor can: for each GiB a lane takes about a second of a processor, a second and a half with TLS, which is 6 to
// 9 Gbit/s. One lane also limits the sweep where the path gives one connection less than all it has: two cables that
// are bundled by hashes (LACP), a cloud's limit for a flow, or a window. On other paths a second lane is a thread more
// at each host, and nothing else.
//
// Only a trial shows which kind of path it is. Each trial is one lane more, or one fewer, for two intervals, of which
// the second counts:
//
//	        rate is steady, pause is over            more ≥ scaleGain × fewer
//	steady ───────────────────────────────► trial ─────────────────────────────► stays at more,
//	   ▲                                      │ else                             next trial in the same direction
//	   └──────────────────────────────────────┴─ stays at fewer; pauses twice as long as the last time
//
// Both directions require the same gain, so a lane that no longer brings it is dropped. A lane that makes faults
// slower, because it takes their processors, is dropped whatever it brings.
type scale struct {
	lanes, most int

	began     int64   // ns: when the interval began
	got, of   int64   // data and bytes that came in it
	faults    uint64  // up to then, since the engine began
	waited    int64   // ns: how long these waited, all together
	wait      float64 // ns: for a fault, in the interval before; 0: not known, or too few faults
	before    float64 // bytes a ns: in the interval before; during a trial, without the trial's lane. 0: not known
	trial     int     // 1, -1: how many lanes the trial has more; 0: none is under way
	direction int     // of the next trial
	warm      bool    // the next interval does not count: a connection begins slowly
	pause     int64   // ns
	again     int64   // ns: no trial begins before this
}

// came records that bytes were answered for at now, data of them not zero, with a round trip of trip. It reports
// whether lanes has changed. How fast zeros come says nothing about lanes. faults returns how many faults there were
// since the engine began, and for how long they waited.
func (s *scale) came(now, trip, bytes, data int64, faults func() (uint64, int64)) (changed bool) {
	if s.most <= 1 {
		return false
	}
	if s.began == 0 {
		s.restart(now)
	}
	s.got, s.of = s.got+data, s.of+bytes
	took := now - s.began
	if took < max(scaleTime.Nanoseconds(), scaleTrips*trip) {
		return false
	}
	rate, zeros := float64(s.got)/float64(took), 2*s.got < s.of
	s.restart(now)
	wait := s.perFault(faults())
	switch {
	case zeros:
		if s.trial == 0 {
			s.before = 0
		}
		return false
	case s.warm:
		s.warm = false
		return false
	case s.trial != 0:
		return s.judge(rate, wait, now)
	}
	s.wait = wait
	switch {
	case s.before == 0 || rate > scaleGain*s.before: // it still rises by itself
		s.before = rate
		return false
	case now < s.again:
		s.before = rate
		return false
	}
	s.before = max(s.before, rate)
	if s.lanes == 1 {
		s.direction = 1
	} else if s.lanes >= s.most {
		s.direction = -1
	}
	s.trial = s.direction
	s.lanes += s.trial
	s.warm = true
	return true
}

// judge ends a trial.
func (s *scale) judge(rate, wait float64, now int64) (changed bool) {
	more, fewer := rate, s.before
	waitMore, waitFewer := wait, s.wait
	if s.trial < 0 {
		more, fewer, waitMore, waitFewer = fewer, more, waitFewer, waitMore
	}
	slower := waitFewer > 0 && waitMore > scaleSlower*waitFewer
	pays := more >= scaleGain*fewer && !slower
	stays := pays == (s.trial > 0)
	s.before = rate
	if stays {
		s.pause = 0
		s.trial = 0
		return false
	}
	s.lanes -= s.trial
	s.before, s.warm = 0, true
	s.direction = -s.trial
	s.trial = 0
	s.rest(now)
	return true
}

// perFault is how long a fault of the last interval waited. Since the engine began there were n faults, which waited
// for ns in all. 0: there were too few to say.
func (s *scale) perFault(n uint64, ns int64) (wait float64) {
	if few := n - s.faults; few >= scaleFaults {
		wait = float64(ns-s.waited) / float64(few)
	}
	s.faults, s.waited = n, ns
	return wait
}

// rest lets no trial begin for a while.
func (s *scale) rest(now int64) {
	s.pause = min(max(2*s.pause, scalePause.Nanoseconds()), scaleLongest.Nanoseconds())
	s.again = now + s.pause
}

// refused says that another lane could not be had.
func (s *scale) refused(now int64) {
	s.trial, s.before, s.warm = 0, 0, false
	s.restart(now)
	s.rest(now)
}

// lost says that a lane was lost; have is how many are left.
func (s *scale) lost(have int, now int64) {
	s.lanes = min(s.lanes, have)
	s.refused(now)
}

func (s *scale) restart(now int64) { s.began, s.got, s.of = max(1, now), 0, 0 }
