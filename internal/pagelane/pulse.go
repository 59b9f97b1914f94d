// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// leastHeard is how many bytes between two beats are a sign of life by themselves, more than the answers to PINGs.
const leastHeard = 1 << 10

// A pulse tells a lane whose source answers from one that waits for ever: TCP knows that the other host is there, and
// nothing of a source that hangs, or that takes a length which was damaged on the way for more than will come.
//
// The source deals with a PING after the requests before it, which on a slow network take longer than that: so
// bytes that come are a sign of life, too.
type pulse struct {
	every time.Duration
	timer *time.Timer
	ping  func() error // sends one
	end   func()       // ends the lane

	heard  atomic.Uint64 // bytes that were read
	acks   atomic.Uint64 // PINGs that were answered
	idle   atomic.Bool   // nobody reads: the receiver is busy with what came
	silent atomic.Bool   // it was this that ended the lane
	over   atomic.Bool   // the lane has ended

	// Of the timer's goroutine.
	heardThen, acksThen uint64
	asked               bool
}

// newPulse makes one that has not started.
func newPulse(every time.Duration, ping func() error, end func()) *pulse {
	p := &pulse{every: every, ping: ping, end: end}
	p.timer = time.AfterFunc(math.MaxInt64, p.beat)
	return p
}

func (p *pulse) start() { p.timer.Reset(p.every) }

// stop is for ever.
func (p *pulse) stop() {
	p.over.Store(true)
	p.timer.Stop()
}

func (p *pulse) beat() {
	heard, acks := p.heard.Load(), p.acks.Load()
	if p.asked && acks == p.acksThen && heard-p.heardThen < leastHeard && !p.idle.Load() {
		p.silent.Store(true)
		p.end()
		return
	}
	p.heardThen, p.acksThen, p.asked = heard, acks, true
	p.timer.Reset(p.every) // first: the next beat ends the lane if this one cannot be sent
	if p.over.Load() {
		p.timer.Stop()
		return
	}
	_ = p.ping() // the receiver learns why not
}

// explain says what ended the lane, if it was silence.
func (p *pulse) explain(err error) error {
	if !p.silent.Load() {
		return err
	}
	return status.Error(codes.Unavailable, fmt.Sprintf("the page server has not answered for %v", p.every))
}
