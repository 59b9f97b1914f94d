// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// A network is what joins the two hosts. Its delay is that of one direction.
type network struct {
	name string
	link *lab.Link // nil: the lab's cable, a pair of virtual interfaces
}

var networks = []network{
	{"loopback", nil},
	{"1G-0.2ms", &lab.Link{Rate: 1e9, Delay: 100 * time.Microsecond}},
	{"10G-0.05ms", &lab.Link{Rate: 10e9, Delay: 25 * time.Microsecond}},
	{"1G-10ms", &lab.Link{Rate: 1e9, Delay: 5 * time.Millisecond}},
}

// A guestLoad is what the guest does meanwhile: parameters of e2e/guest.
type guestLoad struct {
	name string
	args []string
	idle bool // visits no memory, so nothing of it can stall
	// real is a VM as most are (lab.RealVM), with private memory, a screen, and so many disks and network cards each; nil:
	// one with a serial port and memory in a file.
	real    *int
	backend lab.Backend // of a real one's memory, if it is not to be the default
	pinged  bool        // has its network cards on, so that a client can ping them
	named   bool        // is of no size: only who names it gets it
}

// Every guest but the idle one has room to be faster than its rate, so that after a stall it can be itself again.
var guests = []guestLoad{
	{name: "idle", args: []string{"migrated.pattern=idle"}, idle: true},
	{name: "random", args: []string{"migrated.pattern=random", "migrated.rate=2000"}},
	{name: "random-compressible", args: []string{"migrated.pattern=random", "migrated.rate=2000", "migrated.fill=compressible"}},
	{name: "sequential", args: []string{"migrated.pattern=sequential", "migrated.rate=4000"}},
	{name: "stride", args: []string{"migrated.pattern=stride", "migrated.rate=4000"}},
}

// deviceGuests are VMs with disks and network cards, whose guest leaves them alone or has them at work. What they
// differ in is how long QEMU takes to save and load the devices.
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

// What a busy guest asks of all its disks and sends by all its network cards, a second; up to four of each have a quarter
// of it. More devices do not have more to do, because emulated CPUs could not.
const (
	diskRequests = 800
	cardMessages = 400
)

// deviceGuest is a VM with n disks and n network cards.
func deviceGuest(n int, busy bool) guestLoad {
	g := guestLoad{name: fmt.Sprintf("devices-%d", n), args: []string{"migrated.pattern=idle"}, idle: true, real: &n}
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

// memoryGuest is a VM without disks and network cards that visits its memory.
func memoryGuest(name string, backend lab.Backend) guestLoad {
	none := 0
	return guestLoad{
		name: name, args: []string{"migrated.pattern=random", "migrated.rate=2000"}, real: &none, backend: backend,
	}
}

// What every VM has, in MiB: the guest stamps stampMiB of its memory and works in all of it.
const (
	memoryMiB = 512
	stampMiB  = 320
)

// window is how often the guest reports, so how exactly its way back to speed is seen. A guest with many devices says
// much of each, byte by byte through a serial port, and has no such way: it reports each deviceWindow.
const (
	window       = 25 * time.Millisecond
	deviceWindow = 200 * time.Millisecond
)

type benchCase struct {
	network network
	guest   guestLoad
	short   bool // one of the short run
	devices bool // one of the run of VMs with devices
}

func (c benchCase) name() string { return c.network.name + "/" + c.guest.name }

func cases() []benchCase {
	short := map[string]bool{
		"loopback/random": true, "loopback/random-compressible": true, "1G-0.2ms/random": true, "1G-0.2ms/random-compressible": true,
		"1G-10ms/sequential": true, // a round trip that is long shows what a short one hides
	}
	var all []benchCase
	for _, n := range networks {
		for _, g := range guests {
			c := benchCase{network: n, guest: g}
			c.short = short[c.name()]
			all = append(all, c)
		}
	}
	for i, n := range networks {
		for _, g := range deviceGuests() {
			g.named = g.named || i > 0
			all = append(all, benchCase{network: n, guest: g, devices: true})
		}
	}
	return all
}

// after is the time after the switch in which the guest's stalls are counted, the same for each contender: what the
// memory takes on this network, half as much again, and a little.
func (c benchCase) after() time.Duration {
	const least = 2 * time.Second
	if c.network.link == nil || c.network.link.Rate == 0 {
		return least
	}
	seconds := float64(stampMiB<<20*8) / float64(c.network.link.Rate)
	return max(least, time.Duration(1.5*seconds*float64(time.Second)))
}

func (c benchCase) vm(kernel, initrd string) lab.VMConfig {
	every := window
	if c.guest.real != nil && c.guest.idle {
		every = deviceWindow
	}
	args := append([]string{
		fmt.Sprintf("migrated.mem=%d", stampMiB), fmt.Sprintf("migrated.window=%v", every),
		"migrated.workers=2", "migrated.write=50",
	}, c.guest.args...)
	if n := c.guest.real; n != nil {
		vm := lab.RealVM(kernel, initrd, memoryMiB, *n, *n, args...)
		vm.Extra = lab.EventsArgs()
		if c.guest.backend != "" {
			vm.Backend = c.guest.backend
		}
		return vm
	}
	return lab.VMConfig{
		VCPUs: 2, MemoryMiB: memoryMiB, Nodes: 1, Kernel: kernel, Initrd: initrd, KernelArgs: args, Extra: lab.EventsArgs(),
	}
}
