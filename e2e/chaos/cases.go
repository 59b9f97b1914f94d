// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// A chaosCase is one migration and what disturbs it. Seed and Index alone determine it.
type chaosCase struct {
	Seed  uint64
	Index int
	Kind  string
	At    moment
	For   time.Duration // how long the fault lasts, if it can be undone
	Link  lab.Link      // the network, before the fault and after it
	Pick  uint64        // chooses among the variants of a kind
	// Memory is the kind of the VM's RAM. In a crowd it is that of the first VM that is made for the crowd.
	Memory lab.Backend

	// Of a crowd: the number of VMs, and the fault that meets them.
	VMs   int
	Crowd string
}

// A moment is when the fault strikes.
type moment struct {
	Point string        // a point of internal/migration; empty: a time
	After time.Duration // since the migration's start, or since the switch
	// Switched is set if After counts from the moment when the VM ran at the destination.
	Switched bool
}

func (m moment) String() string {
	switch {
	case m.Point != "":
		return "at " + m.Point
	case m.Switched:
		return fmt.Sprintf("%v after the switch", m.After)
	default:
		return fmt.Sprintf("%v after the start", m.After)
	}
}

func (c chaosCase) String() string {
	what := c.Kind
	if c.Kind == crowd {
		what = fmt.Sprintf("%d VMs at once, %s", c.VMs, c.Crowd)
	}
	return fmt.Sprintf("case %d: %s %v, for %v; %s RAM, %d Mbit/s, %v, %.1f %% lost",
		c.Index, what, c.At, c.For, c.Memory, c.Link.Rate/1e6, c.Link.Delay, 100*c.Link.Loss)
}

// Kinds of faults; faults.go says what they do.
const (
	killSource        = "kill-source-daemon"
	killDestination   = "kill-destination-daemon"
	killBoth          = "kill-both-daemons"
	stopSource        = "stop-source-daemon"
	stopDestination   = "stop-destination-daemon"
	killTheirQEMU     = "kill-destination-qemu"
	killTheirHost     = "kill-destination-host" // its daemon and its QEMU at once
	killOurQEMU       = "kill-source-qemu"
	pullCable         = "pull-cable"
	cutBoth           = "cut-both-ways"
	cutOne            = "cut-one-way"
	badLink           = "bad-link"
	freezeSource      = "freeze-source-daemon"
	freezeDestination = "freeze-destination-daemon"
	freezeTheirQEMU   = "freeze-destination-qemu"
	fullTmpfs         = "full-tmpfs"
	fullHugePages     = "full-huge-pages"
	flipBits          = "flip-bits"
	lyingSource       = "lying-source"
	crowd             = "crowd"

	// What others than migrated do, see others.go.
	quitVM              = "quit-vm"
	powerOff            = "guest-powers-off"
	resetGuest          = "guest-resets"
	panicGuest          = "guest-panics"
	continueSource      = "continue-source"
	continueDestination = "continue-destination"
	snapshotDisk        = "snapshot-disk"
	foreignMapper       = "foreign-mapper"

	// noFault breaks nothing. The other faults are compared with it.
	noFault = "nothing"
)

// deck has each kind as often as it comes in so many cases. Every deckful has all of them, in an order of its own.
var deck = []string{
	killSource, killSource, killSource, killDestination, killDestination, killDestination, killBoth, killBoth,
	stopSource, stopDestination, killTheirQEMU, killTheirHost, killOurQEMU, pullCable, cutBoth, cutOne, badLink,
	freezeSource, freezeDestination, freezeTheirQEMU, fullTmpfs, fullHugePages, flipBits, lyingSource, crowd,
	quitVM, powerOff, resetGuest, panicGuest, continueSource, continueDestination, snapshotDisk, foreignMapper,
}

// memories are the kinds of RAM, as often as they come. Most VMs have the RAM that QEMU takes by default.
var memories = []lab.Backend{lab.BackendDefault, lab.BackendDefault, lab.BackendFile}

// crowdFaults are the faults that many migrations can meet together.
var crowdFaults = []string{killSource, killDestination, killBoth, cutBoth, cutOne, badLink}

// A pack is the cards from which cases are dealt.
type pack struct {
	deck     []string
	memories []lab.Backend
}

// The packs of VMs that the suite starts, and of VMs that are domains of libvirt's.
var (
	ofQEMUs   = pack{deck, memories}
	ofDomains = pack{libvirtDeck, libvirtMemories}
)

// newCase returns case index of the seed's sequence. Its point is one of at. If at lacks some points, the fault comes
// at a point wherever its kind allows that.
func newCase(seed uint64, index int, p pack, at []point) chaosCase {
	r := rand.New(rand.NewPCG(seed, uint64(index)))
	c := chaosCase{
		Seed: seed, Index: index, Kind: deal(seed, index, 1, p.deck), Pick: r.Uint64(),
		For: lasting(r), Link: network(r), Memory: deal(seed, index, 3, p.memories),
	}
	c.Link.Seed = c.Pick
	c.At = c.when(r, at)
	switch c.Kind {
	case fullTmpfs, flipBits, lyingSource: // these take a while to have an effect
		c.For += time.Second
	}
	switch c.Kind {
	case fullTmpfs, fullHugePages, foreignMapper:
		c.Memory = lab.BackendFile // only RAM in files can fill a file system, or be mapped
	}
	if c.Kind == crowd {
		c.VMs = 2
		if r.IntN(3) == 0 {
			c.VMs = 8
		}
		c.Crowd = crowdFaults[r.IntN(len(crowdFaults))]
		c.At = moment{After: upTo(r, 4*time.Second)}
		c.For = min(c.For, 3*time.Second) // so many guests on two processors are slow anyway
	}
	return c
}

// deal returns the card of case index. Cards are dealt to one case after the other, and shuffled anew when all are
// dealt. Each purpose has a pack of its own.
func deal[T any](seed uint64, index int, purpose uint64, cards []T) T {
	round := rand.New(rand.NewPCG(seed^purpose<<32, uint64(index/len(cards))))
	return cards[round.Perm(len(cards))[index%len(cards)]]
}

// when chooses the moment: mostly a point. Most of the times are after the switch, where most of a migration is.
func (c chaosCase) when(r *rand.Rand, at []point) moment {
	point := deal(c.Seed, c.Index, 2, at)
	early, late := upTo(r, 1200*time.Millisecond), upTo(r, c.transfer())
	dice := r.IntN(10)
	if len(at) < len(points) {
		dice = 0
	}
	switch c.Kind {
	case killTheirQEMU, killTheirHost:
		if slices.Contains(tooLate, point.name) {
			dice = 9
		}
	case killOurQEMU: // before the switch this kills the VM, which is no failed migration
		return moment{After: late, Switched: true}
	case fullHugePages: // from the beginning
		return moment{}
	case flipBits, lyingSource, badLink, fullTmpfs, powerOff, panicGuest:
		dice = 6 + dice%4 // they concern pages on their way, or a guest that hears
	case continueSource:
		return moment{Point: deal(c.Seed, c.Index, 4, stands)}
	case continueDestination, destroyWaiting:
		return moment{Point: deal(c.Seed, c.Index, 4, waits)}
	}
	switch {
	case dice < 6:
		return moment{Point: point.name}
	case dice < 8:
		return moment{After: early}
	default:
		return moment{After: late, Switched: true}
	}
}

// transfer is roughly the time that the VM's memory takes on the case's network after the switch.
func (c chaosCase) transfer() time.Duration {
	const bits = 90e6 * 8
	return time.Duration(bits / float64(c.Link.Rate) * float64(time.Second))
}

// At the points of stands the source keeps the VM stopped. At the first two no QEMU was told yet to run it; from the
// commit on QEMU refuses to run it. At the points of waits the destination's QEMU waits for the VM.
var (
	stands = []string{"source-stopped", "source-saved", "source-committed", "source-answered"}
	waits  = []string{
		"destination-started", "destination-taken", "destination-early", "destination-early-loaded", "destination-kept",
		"destination-prepared", "destination-loading",
	}
)

// tooLate are the points at which all of the VM is at the destination. A QEMU that is killed there concerns no
// migration.
var tooLate = []string{"source-last-page", "source-completing", "source-quit", "source-reported", "source-forgotten",
	"destination-completed", "destination-ended"}

func upTo(r *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(r.Int64N(int64(most))).Round(time.Millisecond)
}

// lasting returns a time that is mostly short, and sometimes longer than the daemons' keepalive.
func lasting(r *rand.Rand) time.Duration {
	switch dice := r.IntN(100); {
	case dice < 75:
		return upTo(r, 1500*time.Millisecond)
	case dice < 95:
		return time.Second + upTo(r, 4*time.Second)
	default:
		return 16*time.Second + upTo(r, 6*time.Second)
	}
}

func network(r *rand.Rand) lab.Link {
	rates := []int64{200e6, 400e6, 400e6, 1e9}
	delays := []time.Duration{0, 0, 200 * time.Microsecond, time.Millisecond}
	losses := []float64{0, 0, 0, 0.001}
	return lab.Link{Rate: rates[r.IntN(len(rates))], Delay: delays[r.IntN(len(delays))], Loss: losses[r.IntN(len(losses))]}
}
