// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// wireMemory is how many bytes of packets are on a wire at most: 10 Gbit/s
	// for 50 ms.
	wireMemory = 64 << 20
	// wirePackets is how many packets are on a wire at most.
	wirePackets = 1 << 16
	// shortestQueue is how long a packet may have to wait for those before it,
	// unless the link's round trip is longer: pfifo_fast's 1000 packets at
	// 1 Gbit/s are 12 ms.
	shortestQueue = 10 * time.Millisecond
	// wakeLead is how long before a packet is due its thread is awake: about
	// what a processor of a virtual machine takes to wake up.
	wakeLead = 30 * time.Microsecond
)

// A Wire is one direction of an emulated link. Packets leave it in the order in
// which they came. Before it is a queue of at most the link's round trip or
// 10 ms, whichever is longer; a packet that would wait longer is dropped, and
// so is one that 64 MiB of packets, or 65536 of them, are in front of.
type Wire struct {
	in, out   int // TUN devices, of the host that sends and of the one that receives
	direction uint64
	epoch     time.Time // times are since then

	mu     sync.Mutex // of these; the thread holds it while a packet arrives at its host
	link   Link
	cut    bool
	cuts   int // how often it was cut
	random *rand.Rand
	stats  Stats

	// The thread's own. Packets lie in memory one after the other, and no packet
	// goes over its end; after the end is room for one that is to be dropped.
	memory  []byte
	packets [wirePackets]packet // a ring: count of them, from the first on
	first   int
	count   int
	tail    int           // where in memory the next packet goes
	free    time.Duration // when the wire has sent what is in the queue
}

// A packet is on its way.
type packet struct {
	at, size int // in the wire's memory
	due      time.Duration
	cuts     int // the wire's, when it was sent
}

func newWire(in, out int, direction uint64) *Wire {
	return &Wire{
		in: in, out: out, direction: direction, epoch: time.Now(),
		memory: make([]byte, wireMemory+maxPacket),
	}
}

// Set changes what the wire is like, for packets that are sent from now on.
// Losses begin anew with the seed. A wire that is cut stays cut.
func (w *Wire) Set(link Link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.link = link
	w.random = rand.New(rand.NewPCG(link.Seed, w.direction))
}

// SetCut cuts the wire or mends it, without a word to either host: nothing
// arrives after it was cut, and what was on it is lost.
func (w *Wire) SetCut(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut = cut; cut {
		w.cuts++
	}
}

// Stats returns what the wire has carried until now.
func (w *Wire) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	stats := w.stats
	stats.At = w.now()
	return stats
}

func (w *Wire) now() time.Duration { return time.Since(w.epoch) }

// carry is the wire's thread. It ends when stop is readable.
func (w *Wire) carry(stop int) {
	runtime.LockOSThread() // for good: the thread ends with the wire
	// A thread that asks for a short slice is let before those that compute
	// (Linux 6.12), and its timers do not wait for others; delays are less
	// precise without. Real-time priority was measured to be punctual on a busy
	// machine too, but to add some 10 to 20 µs to every packet.
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Policy: unix.SCHED_NORMAL, Runtime: 100_000}, 0)
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	fds := []unix.PollFd{{Fd: int32(w.in), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
	var timeout unix.Timespec
	for fds[1].Revents == 0 {
		at, room := w.room()
		n, err := unix.Read(w.in, w.memory[at:at+maxPacket])
		now := w.now()
		if err == nil {
			w.accept(at, n, room, now)
		}
		w.deliver(now)
		if err == nil {
			continue // there may be more
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return // the host is gone, and the device with it
		}
		var until *unix.Timespec // the next packet is due, if there is one
		if w.count > 0 {
			wait := w.packets[w.first].due - wakeLead - w.now()
			if wait <= 0 {
				continue // awake: what is sent meanwhile is seen at once
			}
			timeout = unix.NsecToTimespec(int64(wait))
			until = &timeout
		}
		_, _ = unix.Ppoll(fds, until, nil) // whatever ends it, the loop looks again
	}
}

// room returns where in memory the next packet goes, and whether it is more
// than the place for one that is to be dropped.
func (w *Wire) room() (at int, ok bool) {
	if w.count == 0 {
		return 0, true // where the processor's caches still know it
	}
	oldest := w.packets[w.first].at
	at = w.tail
	if at > oldest && at+maxPacket > wireMemory {
		at = 0
	}
	if w.count == wirePackets || at <= oldest && at+maxPacket > oldest {
		return wireMemory, false
	}
	return at, true
}

// accept puts the packet of n bytes at that place in memory on the wire.
func (w *Wire) accept(at, n int, room bool, now time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	starts := max(now, w.free)
	switch queue := max(shortestQueue, 2*w.link.Delay); {
	case w.cut:
		w.stats.Cut++
		return
	case !room || starts-now > queue:
		w.stats.Dropped++
		return
	}
	bytes := wireBytes(w.memory[at : at+n])
	w.stats.Packets++
	w.stats.Bytes += bytes
	w.free = starts
	if w.link.Rate > 0 {
		w.free += time.Duration(float64(bytes) * 8e9 / float64(w.link.Rate))
	}
	if w.random.Float64() < w.link.Loss {
		w.stats.Lost++ // it took its time on the wire
		return
	}
	w.packets[(w.first+w.count)%wirePackets] = packet{at: at, size: n, due: w.free + w.link.Delay, cuts: w.cuts}
	w.count++
	w.tail = at + n
}

// deliver hands over what is due.
func (w *Wire) deliver(now time.Duration) {
	for w.count > 0 && w.packets[w.first].due <= now {
		p := w.packets[w.first]
		w.first = (w.first + 1) % wirePackets
		w.count--
		w.mu.Lock()
		if p.cuts != w.cuts {
			w.stats.Cut++
		} else if _, err := unix.Write(w.out, w.memory[p.at:p.at+p.size]); err != nil {
			w.stats.Refused++
		}
		w.mu.Unlock()
	}
}
