// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"slices"
	"sync/atomic"
)

// A stepper holds the current step of one side of a migration. A table says which steps may follow which, and the
// stepper moves only along it. It can be read at any time. The zero value is at the first step.
type stepper[S interface {
	~int32
	next() []S // the steps that may follow
}] struct {
	current atomic.Int32
	moves   atomic.Uint32 // number of moves so far
}

func (s *stepper[S]) step() S { return S(s.current.Load()) }

// moveTo moves to next, and reports whether next may follow the current step. If not, nothing changes.
func (s *stepper[S]) moveTo(next S) bool {
	for {
		now := s.step()
		if !slices.Contains(now.next(), next) {
			return false
		}
		if s.current.CompareAndSwap(int32(now), int32(next)) {
			s.moves.Add(1)
			return true
		}
	}
}
