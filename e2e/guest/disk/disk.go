// SPDX-License-Identifier: Apache-2.0

// Package disk is the guest's work on its disks: it writes stamped blocks, reads them back, and knows what each of them
// must hold. A block of storage can be damaged in the same ways as a page of memory, so blocks are stamped pages
// (package stamp): each names its disk, its place there and its generation, all of its words follow from these, and the
// generations are kept in memory.
//
//	lane 0 ──► blocks [0, n/2)   table [0, n/2)   ┐ O_DIRECT
//	lane 1 ──► blocks [n/2, n)   table [n/2, n)   ┴──────────► /dev/vda
//
// A lane has one request in flight, so a disk has two.
package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/pace"
	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// Lanes is how many requests a disk has in flight.
const Lanes = 2

const (
	blockSize  = stamp.PageSize
	blockBits  = 20                   // a stamp's index is disk<<blockBits | block
	maxBlocks  = 64 << 20 / blockSize // the blocks of a disk that are used; few enough to check all of them
	maxDisks   = 1 << (32 - blockBits)
	chunk      = 64 // blocks that a check reads at once
	flushEvery = 64 // writes of a lane
	maxPending = 64 // findings that wait to be written out
)

// Config says what is done with the disks.
type Config struct {
	Disks int // their number; they are found by their serial numbers disk0, disk1, …
	Rate  int // requests a second and disk; 0: as many as possible
}

// Validate returns an error if a parameter makes no sense.
func (c Config) Validate() error {
	if c.Disks < 0 || c.Disks > maxDisks || c.Rate < 0 {
		return fmt.Errorf("%d disks at %d requests a second: neither is negative, and there are no more than %d disks",
			c.Disks, c.Rate, maxDisks)
	}
	return nil
}

// interval returns the time between two requests of a lane.
func (c Config) interval() time.Duration {
	if c.Rate == 0 {
		return 0
	}
	return Lanes * time.Second / time.Duration(c.Rate)
}

// A Set is all disks of the guest.
type Set struct {
	disks    []*disk
	findings chan Finding
}

// A Finding is a block that does not hold what was written last, or a request that failed.
type Finding struct {
	Disk   string       // its serial number
	Damage stamp.Damage // Page is the block
	Err    error        // of the request that failed; nil for damage
}

// Open finds the disks. It sends no requests to them; these begin with Run(true).
func Open(c Config) (*Set, error) {
	s := &Set{findings: make(chan Finding, maxPending)}
	for i := range c.Disks {
		serial := "disk" + strconv.Itoa(i)
		path, err := find(serial)
		if err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", serial, err)
		}
		d, err := newDisk(s, serial, i, f, c.interval())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", serial, err)
		}
		s.disks = append(s.disks, d)
	}
	for _, d := range s.disks {
		for _, l := range d.lanes {
			go l.pace.Run(l.step)
		}
	}
	return s, nil
}

// Run makes the disks work or rest. It returns when they do.
func (s *Set) Run(on bool) {
	for _, d := range s.disks {
		for _, l := range d.lanes {
			l.pace.Set(on)
		}
	}
}

// Report returns the counters of each disk.
func (s *Set) Report() []report.Disk {
	var all []report.Disk
	for _, d := range s.disks {
		all = append(all, d.report())
	}
	return all
}

// Verify reads every block that was ever written and compares it. Work pauses meanwhile, lane by lane. It returns how
// many blocks there are, and how many of them are damaged or cannot be read.
func (s *Set) Verify() (blocks, found uint64) {
	for _, d := range s.disks {
		for _, l := range d.lanes {
			l.pace.Between(func() {
				b, f := l.check()
				blocks, found = blocks+b, found+f
			})
		}
	}
	return blocks, found
}

// Finding returns one finding that was not returned yet. All are counted, but only the first are described.
func (s *Set) Finding() (Finding, bool) {
	select {
	case f := <-s.findings:
		return f, true
	default:
		return Finding{}, false
	}
}

func (s *Set) found(f Finding) {
	select {
	case s.findings <- f:
	default:
	}
}

// A disk is one disk of the set.
type disk struct {
	set    *Set
	serial string
	number int
	file   *os.File
	table  stamp.Table // generation of each block; 0: was never written
	lanes  []*lane

	reads, writes, flushes, errs, corruptions atomic.Uint64
	slowest                                   pace.Slowest
}

// newDisk takes over an open disk, and makes its lanes, which rest. Each lane has a request at that interval.
func newDisk(s *Set, serial string, number int, f *os.File, interval time.Duration) (*disk, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	blocks := uint32(min(size/blockSize, maxBlocks))
	if blocks < Lanes {
		return nil, fmt.Errorf("%d bytes are too few", size)
	}
	d := &disk{set: s, serial: serial, number: number, file: f, table: make(stamp.Table, blocks)}
	for i := range blocks {
		d.table.Set(i, 0)
	}
	for i := range uint32(Lanes) {
		buffer, err := unix.Mmap(-1, 0, chunk*blockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil, fmt.Errorf("map a buffer: %w", err)
		}
		l := &lane{
			disk: d, pace: pace.New(interval), from: blocks / Lanes * i, to: blocks / Lanes * (i + 1),
			random: uint64(number*Lanes+int(i)+1) * 0x9e3779b97f4a7c15, buffer: buffer,
			pages: unsafe.Slice((*stamp.Page)(unsafe.Pointer(&buffer[0])), chunk),
		}
		d.lanes = append(d.lanes, l)
	}
	return d, nil
}

func (d *disk) report() report.Disk {
	return report.Disk{
		Name: d.serial, Reads: d.reads.Load(), Writes: d.writes.Load(), Flushes: d.flushes.Load(),
		Errors: d.errs.Load(), Corruptions: d.corruptions.Load(), MaxUS: d.slowest.Take().Microseconds(),
	}
}

// damaged counts and reports a damaged block.
func (d *disk) damaged(damage stamp.Damage) {
	d.corruptions.Add(1) // counted first, because the count must not be lost
	d.set.found(Finding{Disk: d.serial, Damage: damage})
}

// failed counts and reports a request that failed.
func (d *disk) failed(err error) {
	d.errs.Add(1)
	d.set.found(Finding{Disk: d.serial, Err: err})
}

// index returns the index in a block's stamp.
func (d *disk) index(block uint32) uint32 { return uint32(d.number)<<blockBits | block }

// timed runs a request and notes its time.
func (d *disk) timed(request func() (int, error)) (int, error) {
	began := time.Now()
	n, err := request()
	d.slowest.Note(time.Since(began))
	return n, err
}

// errShort says that a request moved less than it should.
var errShort = errors.New("short transfer")

// A lane owns blocks [from, to) and their table entries, so that a difference is damage and never a race.
type lane struct {
	disk     *disk
	pace     *pace.Worker
	from, to uint32

	// Owned by step, and by check between two steps.
	random  uint64 // xorshift64 state
	sum     uint64 // of the generations in [from, to), see stamp.Table
	unsaved int    // writes since the last flush
	buffer  []byte // for O_DIRECT on a page boundary
	pages   []stamp.Page
}
