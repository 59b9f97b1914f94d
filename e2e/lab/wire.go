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
	// wireMemory is the maximum number of bytes of the packets on a wire: 10 Gbit/s
	// for 50 ms.
	wireMemory = 64 << 20
	// wirePackets is the maximum number of packets on a wire.
	wirePackets = 1 << 16
	// shortestQueue is how long a packet may wait for the packets before it, if
	// the link's round trip is not longer. pfifo_fast's 1000 packets at
	// 1 Gbit/s are 12 ms.
	shortestQueue = 10 * time.Millisecond
	// wakeLead is how long before a packet is due its thread wakes up. It is about
	// the time that a processor of a virtual machine takes to wake up.
	wakeLead = 30 * time.Microsecond
)

// Wire is one direction of an emulated link. Packets leave it in the order in
// which they came. Before the wire there is a queue of at most the link's round
// trip or 10 ms, whichever is longer. A packet that would wait longer is dropped.
// So is a packet behind 64 MiB of packets or behind 65536 packets.
type Wire struct {
	in, out   int // TUN devices of the sending and of the receiving host
	direction uint64
	epoch     time.Time // all times are relative to it

	mu     sync.Mutex // guards the fields below up to stats; held while a packet arrives at its host
	link   Link
	cut    bool
	cuts   int // how often it was cut
	random *rand.Rand
	stats  Stats

	// Owned by the thread. Packets are in memory one after the other, and no packet
	// crosses its end. After the end is room for a packet that will be dropped.
	memory  []byte
	packets [wirePackets]packet // a ring of count packets, which begins at first
	first   int
	count   int
	tail    int           // offset in memory of the next packet
	free    time.Duration // when the wire will have sent everything in the queue
}

// packet is a packet on the wire.
type packet struct {
	at, size int // in the wire's memory
	due      time.Duration
	cuts     int // Wire.cuts when it was sent
}

func newWire(in, out int, direction uint64) *Wire {
	return &Wire{
		in: in, out: out, direction: direction, epoch: time.Now(),
		memory: make([]byte, wireMemory+maxPacket),
	}
}

// Set changes the wire's link, for packets that are sent from now on.
// Losses start again with the seed. A wire that is cut stays cut.
func (w *Wire) Set(link Link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.link = link
	w.random = rand.New(rand.NewPCG(link.Seed, w.direction))
}

// SetCut cuts the wire or mends it. The hosts are not told. Nothing
// arrives on a wire that is cut, and the packets on it are lost.
func (w *Wire) SetCut(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut = cut; cut {
		w.cuts++
	}
}

// Stats returns the statistics of the wire until now.
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
	runtime.LockOSThread() // permanently: the thread ends with the wire
	// A thread that asks for a short slice runs before threads that compute
	// (Linux 6.12), and its timers are not delayed to expire with others. Without that,
	// delays are less precise. Real-time priority was measured to be punctual on a busy
	// machine, too, but to add some 10 to 20 µs to every packet.
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
			return // the host and its device are gone
		}
		var until *unix.Timespec // when the next packet is due; nil if there is none
		if w.count > 0 {
			wait := w.packets[w.first].due - wakeLead - w.now()
			if wait <= 0 {
				continue // stay awake: packets that are sent meanwhile are read immediately
			}
			timeout = unix.NsecToTimespec(int64(wait))
			until = &timeout
		}
		_, _ = unix.Ppoll(fds, until, nil) // the loop looks again, also after an error
	}
}

// room returns the offset in memory of the next packet. ok is false if only the
// room for a packet that will be dropped is left.
func (w *Wire) room() (at int, ok bool) {
	if w.count == 0 {
		return 0, true // memory that is probably still in the processor's caches
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

// accept puts the packet of n bytes at offset at in memory on the wire.
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
		w.stats.Lost++ // it still took its time on the wire
		return
	}
	w.packets[(w.first+w.count)%wirePackets] = packet{at: at, size: n, due: w.free + w.link.Delay, cuts: w.cuts}
	w.count++
	w.tail = at + n
}

// deliver gives the packets that are due to the receiving host.
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
