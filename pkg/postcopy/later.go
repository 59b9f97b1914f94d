// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync"
	"time"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

const (
	// firstLater is how long threads are left asleep when the kernel refuses for the first time to fill the page that they
	// wait for. longestLater is the most, after it has refused again and again.
	firstLater   = 100 * time.Microsecond
	longestLater = 10 * time.Millisecond
)

// later wakes threads after a pause. Their page could not be filled because the address space is changing (EAGAIN),
// which ends when an event has been read. But read(2) returns faults before events (userfaultfd_ctx_read in
// fs/userfaultfd.c). If the threads faulted again at once, and were more than one read returns, the event would never
// be read.
//
// It is not on the usual way of a fault: the kernel refuses only while memory is given up.
type later struct {
	mu     sync.Mutex
	timer  *time.Timer // nil: never used
	armed  bool
	closed bool
	pause  time.Duration
	last   time.Time // when it woke threads
	all    []sleeper
}

type sleeper struct {
	uffd *uffd.UFFD
	at   uffd.Range
}

// wake wakes the threads that wait for the page at at, after a pause: they fault again.
func (l *later) wake(u *uffd.UFFD, at uffd.Range) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed { // the next session wakes all threads
		return
	}
	l.all = append(l.all, sleeper{u, at})
	if l.armed {
		return
	}
	l.pause = min(2*l.pause, longestLater)
	if l.pause == 0 || time.Since(l.last) > 4*l.pause {
		l.pause = firstLater
	}
	l.armed = true
	if l.timer == nil {
		l.timer = time.AfterFunc(l.pause, l.due)
	} else {
		l.timer.Reset(l.pause)
	}
}

func (l *later) due() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.armed, l.last = false, time.Now()
	if l.closed {
		return
	}
	for _, s := range l.all {
		_ = s.uffd.Wake(s.at) // if the process is gone there is nobody to wake; that it is gone is found elsewhere
	}
	l.all = l.all[:0]
}

// open begins a session, stop ends it: no descriptor is used after that.
func (l *later) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = false
}

func (l *later) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed, l.all = true, nil
}
