// SPDX-License-Identifier: Apache-2.0

package main

import "time"

// machineUse is the use of the CPUs while something was measured, as parts of all CPU time. Emulation is work that a
// real host would not have: QEMU's vCPU threads, which translate the guest's code, and the emulated link. Others are
// programs that have nothing to do with the measurement; they should use nothing.
type machineUse struct{ Busy, Emulation, Others float64 }

func usedBetween(from, to cpu) machineUse {
	all := to.all - from.all
	if all <= 0 {
		return machineUse{}
	}
	part := func(d time.Duration) float64 { return max(0, float64(d)/float64(all)) }
	used := to.used - from.used
	emulation := to.vcpus - from.vcpus + to.bench - from.bench
	known := emulation + to.daemons - from.daemons + to.qemus - from.qemus
	return machineUse{Busy: part(used), Emulation: part(emulation), Others: part(used - known)}
}

const (
	// decidingPart is the part of a figure that the emulator alone must cause for the figure to count as the emulator's.
	decidingPart = 0.5
	// busyMachine is the part of the CPUs from which on a lack of CPU time limits all contenders.
	busyMachine = 0.95
	// nearBareTCP is the part of bare TCP's use of the link from which on the link is the limit.
	nearBareTCP = 0.95
)

// emulatorDecides reports whether a measure of a pair shows the emulator rather than the contenders. It does if a VM
// that is not moved has at least half of the better one's figure in the same minutes, or if bare TCP makes no more of
// the link. For a measure that such a VM does not have, it does if all CPUs were busy and at least half of that was
// emulation.
func (r *caseReport) emulatorDecides(m measure, p aPair) bool {
	a, b := r.By[p.ours][m.name], r.By[p.theirs][m.name]
	if a == nil || b == nil || len(a.All) == 0 || len(b.All) == 0 {
		return false
	}
	unmoved := r.By[still][m.name]
	switch m.still {
	case asItIs:
		return unmoved != nil && len(unmoved.All) > 0 && unmoved.Median >= decidingPart*min(a.Median, b.Median)
	case byTime:
		took, ofStill := r.By[p.ours]["took"], r.By[still]["took"]
		if unmoved == nil || len(unmoved.All) == 0 || ofStill.Median == 0 {
			return false
		}
		return unmoved.Median/ofStill.Median*took.Median >= decidingPart*min(a.Median, b.Median)
	case ofBareTCP:
		if unmoved == nil || len(unmoved.All) == 0 {
			return false
		}
		if m.more {
			return max(a.Median, b.Median) >= nearBareTCP*unmoved.Median
		}
		return min(a.Median, b.Median) <= unmoved.Median/nearBareTCP
	default:
		for _, who := range []string{p.ours, p.theirs} {
			busy, emulation := r.By[who]["busy"], r.By[who]["emulation"]
			if busy.Median >= busyMachine && emulation.Median >= decidingPart*busy.Median {
				return true
			}
		}
		return false
	}
}
