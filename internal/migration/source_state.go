// SPDX-License-Identifier: Apache-2.0

package migration

import "sync"

// A sourceStep is how far a migration away from this host has come. It decides who may run the VM, and what a failure
// does.
//
//	notStopped ──▶ stopAsked ──▶ pastCommit ──▶ runAsked ──▶ runsThere
//	    ▲            │   ▲           │             │            │
//	    └────────────┘   └───────────┴─────────────┴────────────┘
//	    to start over        the destination has promised not to run the VM, was not told to,
//	                         or the operator says where the VM is
//
// A restarted daemon goes on at stopAsked or runAsked, as the record says. The record is committed before the
// destination is told anything.
type sourceStep int32

const (
	notStopped sourceStep = iota // the VM was not touched
	stopAsked                    // QEMU was asked to stop the VM: a failure continues it
	pastCommit                   // the record is committed: only proof that the VM was not run there continues it
	runAsked                     // the destination may have been told to run the VM
	runsThere                    // the destination has said that it runs the VM
)

// sourceStepTable has, for each step, the steps that may follow it.
var sourceStepTable = [...][]sourceStep{
	notStopped: {stopAsked},
	stopAsked:  {notStopped, pastCommit},
	pastCommit: {stopAsked, runAsked},
	runAsked:   {stopAsked, runAsked, runsThere},
	runsThere:  {stopAsked},
}

func (s sourceStep) next() []sourceStep { return sourceStepTable[s] }

// A sourceState is everything that is known of how far a migration away from this host has come. The goroutine of
// Source.run changes it. After that goroutine has ended, FallBack and Release do.
type sourceState struct {
	stepper[sourceStep]
	declareMu   sync.Mutex // FallBack and Release, one at a time
	commitMu    sync.Mutex // orders a commit and a cancellation
	missedLimit error      // the limit that passed while the VM was handed over; nil: none; guarded by commitMu
}

// stopTried reports whether the VM may stand still because of this migration.
func (s *sourceState) stopTried() bool { return s.step() >= stopAsked }

// isCommitted reports whether the VM is handed over.
func (s *sourceState) isCommitted() bool { return s.step() >= pastCommit }

// toldToRun reports whether the destination may have been told to run the VM.
func (s *sourceState) toldToRun() bool { return s.step() >= runAsked }

// confirmedRun reports whether the destination has said that it runs the VM.
func (s *sourceState) confirmedRun() bool { return s.step() == runsThere }

// takeUpState sets the step from the record of an earlier run of the daemon. If the record is committed, that run may
// have told the destination to run the VM.
func (s *sourceState) takeUpState(rec Record) {
	now := stopAsked
	if rec.Committed {
		now = runAsked
	}
	s.current.Store(int32(now))
}
