// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// A network joins the two hosts. Its delay is for one direction.
type network struct {
	name string
	link *lab.Link // nil: the lab's cable, a pair of virtual interfaces
	// becomes is what the link changes to, pathAfter after the switch, as when packets take another path; nil: it stays.
	becomes *lab.Link
}

// pathAfter is how long after the switch a path changes. By then the sweep has found out what the link carries.
const pathAfter = 1500 * time.Millisecond

// Links that have a name because a network changes from one to the other.
var (
	far  = lab.Link{Rate: 1e9, Delay: 5 * time.Millisecond}
	fast = lab.Link{Rate: 2e9, Delay: 10 * time.Millisecond}
)

// Names of networks that the targets are about.
const (
	onLoopback = "loopback"
	onFar      = "1G-10ms"
	onFast     = "2G-20ms"
	onPath     = "1G-10ms-then-2G-20ms"
)

var networks = []network{
	{onLoopback, nil, nil},
	{"1G-0.2ms", &lab.Link{Rate: 1e9, Delay: 100 * time.Microsecond}, nil},
	{"10G-0.05ms", &lab.Link{Rate: 10e9, Delay: 25 * time.Microsecond}, nil},
	{onFar, &far, nil},
	{onFast, &fast, nil},
	{onPath, &far, &fast},
}

// A guestLoad is a VM like most VMs (lab.RealVM), and what its guest does: parameters of e2e/guest.
type guestLoad struct {
	name    string
	args    []string
	devices int  // disks and network cards, each
	idle    bool // visits no memory, so that it cannot stall
	// memoryMiB and stampMiB are set for VMs of another size than the rest; 0: the constants of the same names.
	memoryMiB, stampMiB int
	backend             lab.Backend // of its memory; empty: the default
	balloon             balloonKind
	pinged              bool // has its network cards on, so that a client can ping them
	named               bool // in no size: it runs only when --case names it
	only                []string
}

// withDevices returns a VM as operators run them. It has a disk that is written to, a network card whose guest sends
// and that a client pings, and all else that lab.RealVM has, a balloon among it. A guest that is not idle could work
// faster than its rate, so that it can return to its rate after a stall.
func withDevices(name string, idle bool, args ...string) guestLoad {
	return guestLoad{name: name, args: args, devices: 1, idle: idle, pinged: true}
}

// sweepGuest is a VM so large that the sweep has time to find its rate, and to find it again on another path: 1.5 GiB
// take 6.4 s at 2 Gbit/s.
func sweepGuest() guestLoad {
	g := withDevices(sweepName, true, "migrated.pattern=idle")
	g.memoryMiB, g.stampMiB, g.only = 2048, 1536, []string{onFast, onPath}
	return g
}

// Names of guests that the targets are about.
const (
	sweepName      = "sweep"
	sequentialName = "sequential"
	randomName     = "random" // and guests whose names begin with it
)

var guests = []guestLoad{
	withDevices("idle", true, "migrated.pattern=idle"),
	withDevices(randomName, false, "migrated.pattern=random", "migrated.rate=2000"),
	withDevices("random-compressible", false,
		"migrated.pattern=random", "migrated.rate=2000", "migrated.fill=compressible"),
	withDevices(sequentialName, false, "migrated.pattern=sequential", "migrated.rate=4000"),
	withDevices("stride", false, "migrated.pattern=stride", "migrated.rate=4000"),
	sweepGuest(),
}

// deviceGuests are VMs with disks and network cards. Their guests either leave the devices alone or use them. The VMs
// differ in how long QEMU takes to save and load the devices.
func deviceGuests() (guests []guestLoad) {
	for _, n := range []int{0, 1, 8, 16} {
		idle := deviceGuest(n, false)
		idle.named = n > 8
		guests = append(guests, idle)
		if n > 0 {
			busy := deviceGuest(n, true)
			busy.named = n > 8
			guests = append(guests, busy)
		}
	}
	return append(guests, memoryGuest("random-private", lab.BackendDefault))
}

// The requests that a busy guest makes of all its disks, and the messages that it sends by all its network cards, a
// second. With up to four devices of a kind, each device does a quarter of that. More devices share the same work,
// because emulated CPUs could not do more.
const (
	diskRequests = 800
	cardMessages = 400
)

// deviceGuest returns a VM with n disks and n network cards.
func deviceGuest(n int, busy bool) guestLoad {
	g := guestLoad{name: fmt.Sprintf("devices-%d", n), args: []string{"migrated.pattern=idle"}, idle: true, devices: n}
	if busy {
		g.name += "-busy"
		g.pinged = n > 0
		g.args = append(g.args, fmt.Sprintf("migrated.disk-rate=%d", diskRequests/max(4, n)),
			fmt.Sprintf("migrated.net-rate=%d", cardMessages/max(4, n)))
	} else {
		g.args = append(g.args, "migrated.disks=0", "migrated.nets=0")
	}
	return g
}

// memoryGuest returns a VM without disks and network cards that visits its memory.
func memoryGuest(name string, backend lab.Backend) guestLoad {
	return guestLoad{name: name, args: []string{"migrated.pattern=random", "migrated.rate=2000"}, backend: backend}
}

// The memory of a VM, in MiB: the guest stamps stampMiB of it and works in all of it.
const (
	memoryMiB = 512
	stampMiB  = 320
)

func (g guestLoad) memory() int { return cmp.Or(g.memoryMiB, memoryMiB) }
func (g guestLoad) stamps() int { return cmp.Or(g.stampMiB, stampMiB) }

// window is how often the guest reports, and so the precision of timeTo90. A guest with many devices reports much of
// each of them, byte by byte through a serial port, and timeTo90 is not measured for it: it reports each deviceWindow.
const (
	window       = 25 * time.Millisecond
	deviceWindow = 200 * time.Millisecond
)

type benchCase struct {
	qemu    string // version, one of lab.QEMUVersions, on both hosts
	network network
	guest   guestLoad
	short   bool // in the short run
	look    bool // in the first look
	devices bool // in the run of VMs with devices, or in another run that uses no TLS
	full    bool // in the full run
}

// name returns the name that --case matches.
func (c benchCase) name() string { return c.network.name + "/" + c.guest.name }

func (c benchCase) String() string { return "QEMU " + c.qemu + ", " + c.name() }

// cases returns all cases with these versions of QEMU.
func cases(versions []string) (all []benchCase) {
	for _, version := range versions {
		for _, n := range networks {
			for _, g := range guests {
				if only := g.only; only != nil && !slices.Contains(only, n.name) || n.becomes != nil && only == nil {
					continue
				}
				c := benchCase{qemu: version, network: n, guest: g}
				c.sizes()
				all = append(all, c)
			}
		}
		for i, n := range networks {
			if n.becomes != nil {
				continue
			}
			for _, g := range deviceGuests() {
				g.named = g.named || i > 0
				all = append(all, benchCase{qemu: version, network: n, guest: g, devices: true})
			}
		}
	}
	return all
}

// sizes sets in which runs the case is. QEMU 11.1 takes part because it alone tells how long its faults took.
func (c *benchCase) sizes() {
	oneOf := func(names ...string) bool { return slices.Contains(names, c.name()) }
	c.look = c.qemu == lab.InstalledQEMU && oneOf("loopback/random")
	c.short = c.qemu != emulator.V11 && oneOf("loopback/random", "loopback/sequential", "1G-10ms/random", "2G-20ms/sweep")
	switch {
	case c.qemu == emulator.V11:
		c.full = oneOf("loopback/random", "loopback/sequential", "1G-0.2ms/random")
	case slices.Contains([]string{randomName, sequentialName, sweepName}, c.guest.name):
		c.full = true
	default:
		c.full = slices.Contains([]string{onLoopback, "1G-0.2ms"}, c.network.name)
	}
}

// after returns for how long after the switch the guest's stalls are counted, the same for each contender: the time
// that the memory takes on this network, and half as much again, but at least 2 s.
func (c benchCase) after() time.Duration {
	const least = 2 * time.Second
	if c.guest.idle || c.network.link == nil || c.network.link.Rate == 0 {
		return least
	}
	seconds := float64(c.guest.stamps()<<20*8) / float64(c.network.link.Rate)
	return max(least, time.Duration(1.5*seconds*float64(time.Second)))
}

func (c benchCase) vm(kernel, initrd string) lab.VMConfig {
	every := window
	if c.guest.idle {
		every = deviceWindow
	}
	args := append([]string{
		fmt.Sprintf("migrated.mem=%d", c.guest.stamps()), fmt.Sprintf("migrated.window=%v", every),
		"migrated.workers=2", "migrated.write=50",
	}, c.guest.args...)
	vm := lab.RealVM(kernel, initrd, c.guest.memory(), c.guest.devices, c.guest.devices, args...)
	vm.Extra = lab.EventsArgs()
	if c.guest.backend != "" {
		vm.Backend = c.guest.backend
	}
	c.guest.balloon.give(&vm)
	return vm
}
