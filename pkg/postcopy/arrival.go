// SPDX-License-Identifier: Apache-2.0

package postcopy

// arrival is what a receiver has to do with a page that came.
type arrival uint8

const (
	arrivalInstall arrival = iota // the caller is to install it, then finish or giveUp (zeros: finishZero or giveUpZero)
	arrivalDrop                   // nothing: it is known, or somebody else installs it
	arrivalUnasked                // nobody has asked for it
)

// arrive decides about a page whose bytes came.
func (t *pages) arrive(p uint64) arrival {
	for {
		switch s := t.get(p); s {
		case swept, ahead, demanded:
			if t.swap(p, s, installing) {
				return arrivalInstall
			}
		case missing:
			return arrivalUnasked
		default:
			return arrivalDrop
		}
	}
}

// arriveZero decides about a page that came as zero. It is known from then on.
func (t *pages) arriveZero(p uint64) arrival {
	for {
		switch s := t.get(p); s {
		case swept, ahead:
			if t.swap(p, s, zero) {
				t.zeros.Add(1)
				t.known(1)
				return arrivalDrop
			}
		case demanded:
			if t.swap(p, demanded, zeroing) {
				t.zeros.Add(1)
				t.known(1)
				return arrivalInstall
			}
		case missing:
			return arrivalUnasked
		default:
			return arrivalDrop
		}
	}
}

// lose marks page p, which the caller holds, as lost. It returns false if the process has given it up: the caller still
// holds it.
func (t *pages) lose(p uint64) bool {
	if !t.swap(p, installing, lost) {
		return false
	}
	t.lost.Add(1)
	t.known(1)
	return true
}

// stillWanted returns how many pages in a row from p on, at most n, the process has not given up. The caller holds
// them.
func (t *pages) stillWanted(p, n uint64) (k uint64) {
	for k < n && t.get(p+k) == installing {
		k++
	}
	return k
}

// drop turns a revoked page, which the caller holds, into zero. Threads that have faulted on it since it was given up
// wait for the caller to wake them.
func (t *pages) drop(p uint64) {
	if t.swap(p, revoked, zero) {
		t.known(1)
	}
}

// finish marks n pages from p on, which the caller holds, as present. It returns true if the process gave one up while
// it was installed: a thread may have faulted on it since, and waits for the caller to wake it.
func (t *pages) finish(p, n uint64) (revokedOne bool) {
	done := int64(0)
	for i := range n {
		switch {
		case t.swap(p+i, installing, present):
			done++
		case t.swap(p+i, revoked, present):
			done++
			revokedOne = true
		}
	}
	t.known(done)
	return revokedOne
}

// giveUp marks n pages from p on as missing, because they could not be installed; those given up meanwhile as zero.
func (t *pages) giveUp(p, n uint64) {
	for i := range n {
		if !t.swap(p+i, installing, missing) {
			t.drop(p + i)
		}
	}
}

// holes marks n pages from p on, whose bytes came and were zero, to be left as holes.
func (t *pages) holes(p, n uint64) {
	came, dropped := int64(0), int64(0)
	for i := range n {
		if t.swap(p+i, installing, zero) {
			came++
		} else if t.swap(p+i, revoked, zero) {
			dropped++
		}
	}
	t.zeros.Add(came)
	t.known(came + dropped)
}

// fillHoles marks those of n pages from p on that read as zero as present: zeros have been installed.
func (t *pages) fillHoles(p, n uint64) {
	for i := range n {
		t.swap(p+i, zero, present)
	}
}

func (t *pages) finishZero(p uint64) { t.swap(p, zeroing, present) }
func (t *pages) giveUpZero(p uint64) { t.swap(p, zeroing, zero) }
