// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// A balloonKind says which balloon a VM has.
type balloonKind string

const (
	quietBalloon balloonKind = "" // a balloon that is never inflated, as in lab.RealVM
	noBalloon    balloonKind = "no balloon"
	// freePages is a balloon with free page reporting: the guest tells the host which pages it freed, and QEMU discards
	// them.
	freePages balloonKind = "free page reporting"
)

func (k balloonKind) give(vm *lab.VMConfig) {
	vm.Balloon = k != noBalloon
	vm.FreePageReporting = k == freePages
}

// balloonKinds are guests that use memory and give it back, again and again. They differ in nothing but the balloon.
// The first is the one that the others are compared with.
var balloonKinds = []guestLoad{
	balloonGuest("no-balloon", noBalloon), balloonGuest("balloon", quietBalloon),
	balloonGuest("balloon-reporting", freePages),
}

func balloonGuest(name string, kind balloonKind) guestLoad {
	g := withDevices(name, false, "migrated.pattern=random", "migrated.rate=2000", "migrated.churn=64")
	g.balloon, g.stampMiB = kind, 256 // room for the memory that it gives back
	return g
}

// balloonNetwork is so slow that the guest gives memory back while the rest still arrives.
var balloonNetwork = networks[1]

// balloonRounds is how many rounds compareBalloons runs for each round of a case. Its rounds are short, and the guests
// that it compares are nearly the same.
const balloonRounds = 2

// compareBalloons measures what a balloon costs.
func compareBalloons(ctx context.Context, o options, until time.Time) (*kindsReport, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	o.rounds *= balloonRounds
	return compareKinds(ctx, o, balloonNetwork, balloonKinds, until)
}
