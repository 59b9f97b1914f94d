// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A step is how far a migration to this host has come.
//
//	preparing ──▶ awaitingEarly ◀──▶ loadingEarly
//	    │                                 │
//	    └────────────▶ prepared ◀─────────┘
//	                       │ LoadDeviceState
//	                       ▼
//	                    loading   a rehearsal ends here
//	                       │ QEMU has loaded it
//	                       ▼
//	                    loaded ◀───────────┐ QEMU refused, and the VM stands still
//	                       │ Run           │
//	                       ▼               │
//	                    running ───────────┘
//	                       │
//	                       ├──▶ filled      all memory is here
//	                       ├──▶ ended       the VM ended by itself
//	                       ├──▶ abandoned   its operator had it ended
//	                       └──▶ lost        QEMU ended while no daemon ran; abandoned may follow
//
//	each step before running ──▶ doomed ──▶ givenUp, or to givenUp at once
//
// A file keeps the steps loaded, running, filled and ended: a restarted daemon goes on from there.
type step int32

const (
	preparing     step = iota // QEMU is started, or attached to, and made ready
	awaitingEarly             // waits for LoadEarlyState
	loadingEarly              // LoadEarlyState is under way
	prepared                  // waits for LoadDeviceState
	loading                   // LoadDeviceState is under way
	loaded                    // waits for Run
	running                   // QEMU was told to run the VM, or is about to be: the VM belongs to this host
	filled                    // all memory is here
	ended                     // the VM ended by itself
	abandoned                 // its operator had it ended
	lost                      // a restarted daemon found that QEMU had ended
	doomed                    // QEMU cannot be told to run the VM, or gets no pages: givenUp follows
	givenUp                   // final: Run is answered with ErrNotRun
)

// stepTable holds the steps' names, for errors and tests, and the steps that may follow each.
var stepTable = [...]struct {
	name string
	next []step
}{
	preparing:     {"being prepared", []step{awaitingEarly, prepared, doomed, givenUp}},
	awaitingEarly: {"waiting for the early state", []step{loadingEarly, doomed, givenUp}},
	loadingEarly:  {"loading the early state", []step{awaitingEarly, prepared, doomed, givenUp}},
	prepared:      {"prepared", []step{loading, doomed, givenUp}},
	loading:       {"loading the device state", []step{loaded, doomed, givenUp}},
	loaded:        {"waiting to be told to run the VM", []step{running, doomed, givenUp}},
	running:       {"told to run the VM", []step{loaded, filled, ended, abandoned, lost}},
	filled:        {"complete", nil},
	ended:         {"over: the VM ended", nil},
	abandoned:     {"abandoned", nil},
	lost:          {"over: QEMU ended while no daemon ran", []step{abandoned}},
	doomed:        {"giving up", []step{givenUp}},
	givenUp:       {"given up", nil},
}

func (s step) String() string { return stepTable[s].name }
func (s step) next() []step   { return stepTable[s].next }

// errDoomed is why a doomed destination refuses to run the VM.
var errDoomed = errors.New("the source's pages cannot be fetched any more, or QEMU cannot be told to run the VM")

// A destinationState holds the step and what else is known of a migration's progress. What a restarted daemon has to
// know of that progress is also written to kept, by these methods alone.
//
// Destination's mu is held for every change but doom. doom is called by the goroutine that fills the memory, which
// must not wait for mu: Run holds it while it waits for QEMU, and QEMU may wait for memory.
type destinationState struct {
	stepper[step]
	reason error      // of givenUp; guarded by mu
	kept   *keptFiles // nil: nothing is kept yet
}

// toldToRun says whether QEMU was told to run the VM. From then on the VM belongs to this host.
func (s *destinationState) toldToRun() bool {
	now := s.step()
	return running <= now && now < doomed
}

// enter moves from one step to the next. Its error says why a call is refused.
func (s *destinationState) enter(from, next step) error {
	if s.step() == from && s.moveTo(next) {
		return nil
	}
	switch s.step() {
	case givenUp:
		return fmt.Errorf("this destination gave up: %w", s.reason)
	case doomed:
		return fmt.Errorf("this destination gives up: %w", errDoomed)
	default:
		return s.outOfOrder(from)
	}
}

// outOfOrder returns the error for a call that needs another step.
func (s *destinationState) outOfOrder(want step) error {
	return fmt.Errorf("this call is out of order (the migration is %v, not %v)", s.step(), want)
}

// doom makes the migration end without running the VM, unless QEMU was told to run it. It says whether the migration
// is doomed or given up, now or from before.
func (s *destinationState) doom() bool { return s.moveTo(doomed) || s.step() >= doomed }

// markLoaded records that QEMU has loaded the whole device state.
func (s *destinationState) markLoaded() error {
	err := s.enter(loading, loaded)
	if err == nil {
		s.kept.header().loaded.Store(1)
	}
	return err
}

// markToldToRun records that QEMU is told to run the VM. It is called before each time that QEMU is told, and says
// whether QEMU may be.
func (s *destinationState) markToldToRun() bool {
	if !s.toldToRun() && !s.moveTo(running) {
		return false
	}
	s.kept.header().toldToRun.Store(1)
	return true
}

// unmarkToldToRun undoes markToldToRun: QEMU has refused, and the VM is stopped.
func (s *destinationState) unmarkToldToRun() {
	if s.moveTo(loaded) {
		s.kept.header().toldToRun.Store(0)
	}
}

// markRunning records that the VM runs here since the given time. paused: the VM was moved paused and stays so.
func (s *destinationState) markRunning(
	since time.Time, paused bool, answer *migratedv1.RunResponse, downtime time.Duration,
) {
	h := s.kept.header()
	if paused {
		h.paused.Store(1)
	}
	h.resumeTime.Store(int64(answer.GetResumeTime().AsDuration()))
	h.serveTime.Store(int64(answer.GetServeTime().AsDuration()))
	h.downtime.Store(int64(downtime))
	h.resumed.Store(since.UnixNano())
}

// markContinued records that a VM that was moved paused has run here since.
func (s *destinationState) markContinued() { s.kept.header().paused.Store(0) }

// runAnswer returns what Run was answered. nil: it is unknown whether QEMU got the command, and Run has to tell it
// again. A VM that ended by itself has run; the source learns how it ended from WatchIncoming.
func (s *destinationState) runAnswer() *migratedv1.RunResponse {
	if !s.toldToRun() {
		return nil
	}
	h := s.kept.header()
	if h.resumed.Load() == 0 && h.ended.Load() == 0 {
		return nil
	}
	return &migratedv1.RunResponse{
		ResumeTime: durationpb.New(time.Duration(h.resumeTime.Load())),
		ServeTime:  durationpb.New(time.Duration(h.serveTime.Load())),
	}
}

// markFilled records that all memory is here.
func (s *destinationState) markFilled() {
	h := s.kept.header()
	h.over.Store(time.Now().UnixNano())
	h.filled.Store(1)
	s.moveTo(filled)
}

// markEnded records that the VM ended by itself.
func (s *destinationState) markEnded(reason migratedv1.Reason) {
	h := s.kept.header()
	h.over.Store(time.Now().UnixNano())
	h.ended.Store(uint64(reason))
	s.moveTo(ended)
}

// takeUpState sets the state from the files of an earlier run of the daemon.
func (s *destinationState) takeUpState(k *keptFiles) {
	s.kept = k
	h := k.header()
	now := preparing // too early to go on from
	switch {
	case h.ended.Load() != 0:
		now = ended
	case h.filled.Load() != 0:
		now = filled
	case h.toldToRun.Load() != 0:
		now = running
	case h.loaded.Load() != 0:
		now = loaded
	}
	s.current.Store(int32(now))
}
