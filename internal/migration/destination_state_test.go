// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/qemu/process"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// stateAt returns a state at a step, with files.
func stateAt(t *testing.T, at step) *destinationState {
	t.Helper()
	s := &destinationState{kept: keptIn(t, t.TempDir())}
	s.current.Store(int32(at))
	return s
}

func keptIn(t *testing.T, dir string) *keptFiles {
	t.Helper()
	facts := &keptFactsV1{QEMU: process.Identity{PID: 1}, Blocks: []keptBlock{{ID: "ram0", Size: 4096, PageSize: 4096}}}
	k, err := createKept(dir, facts, &migratedv1.PrepareIncomingRequest{Id: filepath.Base(dir), Protocol: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.close() })
	return k
}

// TestSteps: the rules that protect the VM hold, whatever the table of steps allows.
func TestSteps(t *testing.T) {
	for from := preparing; from <= givenUp; from++ {
		s := stateAt(t, from)
		for to := preparing; to <= givenUp; to++ {
			s.current.Store(int32(from))
			before := s.moves.Load()
			went := s.moveTo(to)
			if went != slices.Contains(from.next(), to) || went != (s.step() == to && s.moves.Load() != before) {
				t.Errorf("%v to %v: %t, and it is %v", from, to, went, s.step())
			}
			switch {
			case !went:
			case to == running && from != loaded:
				t.Errorf("QEMU is told to run a VM whose migration is %v", from)
			case from >= doomed && to < doomed:
				t.Errorf("what was given up goes on: %v to %v", from, to)
			case from == running && to == givenUp:
				t.Error("a VM that may run here is given up")
			}
		}
		s.current.Store(int32(from))
		if told := s.toldToRun(); s.doom() == told || told && s.step() != from {
			t.Errorf("%v: told to run: %t, and it is %v when QEMU is lost", from, told, s.step())
		}
		if from.String() == "" {
			t.Errorf("step %d has no name", from)
		}
	}
}

// TestToldOrDoomed: if markToldToRun and doom run at the same time, exactly one succeeds, in the file too.
func TestToldOrDoomed(t *testing.T) {
	k := keptIn(t, t.TempDir())
	for range 1000 {
		s := &destinationState{kept: k}
		s.current.Store(int32(loaded))
		k.header().toldToRun.Store(0)
		var told, doomedIt bool
		var wait sync.WaitGroup
		wait.Go(func() { told = s.markToldToRun() })
		wait.Go(func() { doomedIt = s.doom() })
		wait.Wait()
		if told == doomedIt || told != s.toldToRun() || told != (k.header().toldToRun.Load() != 0) {
			t.Fatalf("told %t, doomed %t, and it is %v", told, doomedIt, s.step())
		}
	}
}

// TestKeptSteps: a restarted daemon finds the step that the earlier one had reached.
func TestKeptSteps(t *testing.T) {
	answer := &migratedv1.RunResponse{ResumeTime: durationpb.New(3), ServeTime: durationpb.New(4)}
	run := func(s *destinationState) { s.markRunning(time.Unix(7, 0), false, answer, 5) }
	for _, c := range []struct {
		name     string
		do       func(s *destinationState)
		want     step
		answered bool
	}{
		{"nothing", func(*destinationState) {}, preparing, false},
		{"loaded", func(s *destinationState) { _ = s.markLoaded() }, loaded, false},
		{"told", func(s *destinationState) { _ = s.markLoaded(); s.markToldToRun() }, running, false},
		{"refused", func(s *destinationState) { _ = s.markLoaded(); s.markToldToRun(); s.unmarkToldToRun() }, loaded, false},
		{"runs", func(s *destinationState) { _ = s.markLoaded(); s.markToldToRun(); run(s) }, running, true},
		{"filled", func(s *destinationState) { _ = s.markLoaded(); s.markToldToRun(); run(s); s.markFilled() }, filled, true},
		{"ended", func(s *destinationState) {
			_ = s.markLoaded()
			s.markToldToRun()
			s.markEnded(migratedv1.Reason_REASON_GUEST_SHUTDOWN)
		}, ended, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			before := &destinationState{kept: keptIn(t, dir)}
			before.current.Store(int32(loading))
			c.do(before)
			if now := before.step(); now != c.want && c.want != preparing {
				t.Errorf("it is %v, want %v", now, c.want)
			}
			if err := before.kept.close(); err != nil {
				t.Fatal(err)
			}
			k, _, _, err := takeUpKept(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer k.close()
			after := &destinationState{}
			after.takeUpState(k)
			if after.step() != c.want {
				t.Errorf("it is taken up as %v, want %v", after.step(), c.want)
			}
			for when, s := range map[string]*destinationState{"its files closed": before, "taken up": after} {
				got := s.runAnswer()
				if (got != nil) != c.answered {
					t.Errorf("%s: Run was answered with %v", when, got)
				}
				if ran := s.kept.header().resumed.Load() != 0; ran && (got.GetResumeTime().AsDuration() != 3 ||
					got.GetServeTime().AsDuration() != 4) {
					t.Errorf("%s: Run was answered with %v, want %v", when, got, answer)
				}
			}
		})
	}
}

// TestOutOfOrder: a call that comes too early, twice or too late changes nothing and says why.
func TestOutOfOrder(t *testing.T) {
	s := stateAt(t, preparing)
	if err := s.enter(prepared, loading); err == nil || s.step() != preparing {
		t.Errorf("%v; it is %v", err, s.step())
	}
	s.doom()
	if err := s.enter(prepared, loading); !errors.Is(err, errDoomed) {
		t.Errorf("doomed: %v", err)
	}
	why := errors.New("the test says so")
	s.moveTo(givenUp)
	s.reason = why
	if err := s.enter(prepared, loading); !errors.Is(err, why) {
		t.Errorf("given up: %v", err)
	}
}
