// SPDX-License-Identifier: Apache-2.0

package web

import "sync"

// places limits the streams that are open at once, of all callers and of each.
type places struct {
	most, mostOfOne int

	mu    sync.Mutex
	taken int
	byOne map[string]int // by caller
}

func newPlaces(most, mostOfOne int) *places {
	return &places{most: most, mostOfOne: mostOfOne, byOne: make(map[string]int)}
}

// take takes a place for a stream of a caller, until leave is called. ok is false if there is none. Callers without a
// name have no limit of their own.
func (p *places) take(one string) (leave func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.most || one != "" && p.byOne[one] >= p.mostOfOne {
		return nil, false
	}
	p.taken++
	p.byOne[one]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.taken--
		if p.byOne[one]--; p.byOne[one] == 0 {
			delete(p.byOne, one)
		}
	}, true
}
