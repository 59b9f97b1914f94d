// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"slices"
	"testing"
)

// TestSourceSteps: the table of steps keeps the rules that protect the VM, whatever else is changed in it.
func TestSourceSteps(t *testing.T) {
	for from := notStopped; from <= runsThere; from++ {
		for to := notStopped; to <= runsThere; to++ {
			s := &sourceState{}
			s.current.Store(int32(from))
			went := s.moveTo(to)
			if went != slices.Contains(from.next(), to) || went && s.step() != to || !went && s.step() != from {
				t.Errorf("%v to %v: %t, and it is %v", from, to, went, s.step())
			}
			switch {
			case !went:
			case to == runAsked && from != pastCommit && from != runAsked:
				t.Errorf("the destination is told to run a VM at step %d, before the record says so", from)
			case to == notStopped && from != stopAsked:
				t.Errorf("a VM at step %d is taken for one that was not touched", from)
			}
		}
	}
	for step, want := range map[sourceStep][4]bool{ // stopTried, isCommitted, toldToRun, confirmedRun
		notStopped: {}, stopAsked: {true}, pastCommit: {true, true}, runAsked: {true, true, true},
		runsThere: {true, true, true, true},
	} {
		s := &sourceState{}
		s.current.Store(int32(step))
		if got := [4]bool{s.stopTried(), s.isCommitted(), s.toldToRun(), s.confirmedRun()}; got != want {
			t.Errorf("step %d: %v, want %v", step, got, want)
		}
	}
}
