// SPDX-License-Identifier: Apache-2.0

// Package load is the guest's work: threads that visit stamped pages, check them completely and write new generations,
// and report how long each visit took.
//
//	worker 0 ──► pages [0, n/2)   table [0, n/2)   ┐ atomics      ┌─► Window
//	worker 1 ──► pages [n/2, n)   table [n/2, n)   ┴────────────► reporter ─┴─► Corruption
//
// Workers share only atomic counters with the reporter, and allocate nothing once they run.
package load

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// Pattern is the order in which a worker visits its working set.
type Pattern string

// The patterns, named as on the guest's command line.
const (
	RandomOrder Pattern = "random"
	Sequential  Pattern = "sequential"
	Stride      Pattern = "stride" // every 17th page: defeats read-ahead
	Idle        Pattern = "idle"   // no visits at all
)

const (
	strideStep      = 17 // pages
	firstGeneration = 1
	maxDescribed    = 64 // corruptions that wait to be written out
)

// Config says what the load does.
type Config struct {
	Memory       uint64 // bytes to stamp
	WorkingSet   uint64 // bytes of it that are visited; the rest stays untouched
	Workers      int    // threads
	Rate         int    // visits a second and worker; 0: as many as possible
	WritePercent int    // share of the visits that write a new generation
	Pattern      Pattern
	Fill         stamp.Fill
	Churn        uint64 // bytes that are used and given back to the kernel, again and again
}

// Load is a running load.
type Load struct {
	config   Config
	interval time.Duration // between two visits of a worker; 0: none
	pages    []stamp.Page  // anonymous mapping
	table    stamp.Table   // anonymous mapping
	workers  []*worker
	running  atomic.Bool
	churn    churn
	damages  chan stamp.Damage
	start    time.Time

	// Owned by the reporter.
	seq  uint64
	ops  uint64 // total at the last window
	seen [][report.Buckets]uint64
}

// New maps and stamps the memory and starts the workers. The load is off until Run(true). The workers never end,
// because they are the only work of their process.
func New(c Config) (*Load, error) {
	n := c.Memory / stamp.PageSize
	working := c.WorkingSet / stamp.PageSize
	if c.Workers < 1 || working < uint64(c.Workers) || working > n || n >= 1<<32 {
		return nil, fmt.Errorf("a load of %d workers needs at least a page of working set for each, "+
			"within its memory: working set %d of %d bytes", c.Workers, c.WorkingSet, c.Memory)
	}
	pages, err := mapMemory(n * stamp.PageSize)
	if err != nil {
		return nil, err
	}
	table, err := mapMemory(n * 8)
	if err != nil {
		return nil, err
	}
	l := &Load{
		config:  c,
		pages:   unsafe.Slice((*stamp.Page)(unsafe.Pointer(&pages[0])), n),
		table:   unsafe.Slice((*uint64)(unsafe.Pointer(&table[0])), n),
		damages: make(chan stamp.Damage, maxDescribed),
		start:   time.Now(),
		seen:    make([][report.Buckets]uint64, c.Workers),
	}
	if c.Rate > 0 {
		l.interval = time.Second / time.Duration(c.Rate)
	}
	share := func(total uint64, i int) uint64 { return total * uint64(i) / uint64(c.Workers) }
	for i := range c.Workers {
		w := &worker{
			load:    l,
			from:    uint32(share(n, i)),
			to:      uint32(share(n, i+1)),
			working: uint32(share(working, i+1) - share(working, i)),
			random:  uint64(i+1) * 0x9e3779b97f4a7c15,
			tasks:   make(chan task),
		}
		l.workers = append(l.workers, w)
		go func() {
			runtime.LockOSThread()
			w.run()
		}()
	}
	l.each((*worker).stampAll)
	if c.Churn > 0 {
		go func() {
			runtime.LockOSThread()
			l.churn.run(l)
		}()
	}
	return l, nil
}

func mapMemory(size uint64) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	return b, nil
}

func (l *Load) now() time.Duration { return time.Since(l.start) }

// each makes every worker run f between two visits, in parallel, and waits for all.
func (l *Load) each(f func(*worker)) {
	done := make(chan struct{})
	for _, w := range l.workers {
		go func() { w.tasks <- task{f, done} }()
	}
	for range l.workers {
		<-done
	}
}

// Run switches the load on or off. It returns when that is done.
func (l *Load) Run(on bool) {
	l.running.Store(on)
	l.each(func(*worker) {}) // wakes idle workers, and waits for visits to end
}

// Pages returns how many pages are stamped, and how many of them are in the working set.
func (l *Load) Pages() (all, working uint32) {
	for _, w := range l.workers {
		working += w.working
	}
	return uint32(len(l.pages)), working
}

// Counters returns the cumulative counters; the caller passes the uptime.
func (l *Load) Counters(uptime time.Duration) report.Counters {
	c := report.Counters{UptimeMS: uptime.Milliseconds()}
	for _, w := range l.workers {
		c.TotalOps += w.totalOps.Load()
		c.TotalWrites += w.totalWrites.Load()
		c.Corruptions += w.corruptions.Load()
	}
	c.Corruptions += l.churn.corruptions.Load()
	c.Churned = l.churn.rounds.Load()
	return c
}

// Verify checks all pages and the table. Visits pause meanwhile.
func (l *Load) Verify() (pages uint32, found uint64) {
	var sum atomic.Uint64
	l.each(func(w *worker) { sum.Add(w.check()) })
	return uint32(len(l.pages)), sum.Load()
}

// Window returns what happened since the last call of Window. Only one goroutine may call it.
func (l *Load) Window(uptime time.Duration) report.Window {
	l.seq++
	latencies := report.Histogram{}
	var slowest int64
	now := int64(l.now())
	for i, w := range l.workers {
		w.latencies.take(latencies, &l.seen[i])
		slowest = max(slowest, int64(w.slowest.Take()))
		if began := w.began.Load(); began != 0 {
			slowest = max(slowest, now-began)
		}
	}
	c := l.Counters(uptime)
	ops := c.TotalOps - l.ops
	l.ops = c.TotalOps
	return report.Window{
		Type: report.TypeWindow, Seq: l.seq, Counters: c, Ops: ops,
		MaxUS:     slowest / 1000,
		P50US:     latencies.Quantile(500) / 1000,
		P99US:     latencies.Quantile(990) / 1000,
		Latencies: latencies,
	}
}

// report counts damage, and describes it if there is room.
func (l *Load) report(corruptions *atomic.Uint64, d stamp.Damage) {
	corruptions.Add(1) // counted first, because the count must not be lost
	select {
	case l.damages <- d:
	default:
	}
}

// Corruption returns one description of damage that was not returned yet.
func (l *Load) Corruption(uptime time.Duration) (report.Corruption, bool) {
	select {
	case d := <-l.damages:
		return report.Corruption{
			Type: report.TypeCorruption, Counters: l.Counters(uptime),
			Page: d.Page, Word: d.Word, Kind: d.Kind,
			Expected: "0x" + strconv.FormatUint(d.Expected, 16),
			Got:      "0x" + strconv.FormatUint(d.Got, 16),
		}, true
	default:
		return report.Corruption{}, false
	}
}

// Validate returns an error if a parameter makes no sense.
func (c Config) Validate() error {
	var errs []error
	switch c.Pattern {
	case RandomOrder, Sequential, Stride, Idle:
	default:
		errs = append(errs, fmt.Errorf("unknown pattern %q", c.Pattern))
	}
	if c.WritePercent < 0 || c.WritePercent > 100 {
		errs = append(errs, fmt.Errorf("write percentage %d is not within 0 and 100", c.WritePercent))
	}
	if c.Rate < 0 {
		errs = append(errs, fmt.Errorf("rate %d is negative", c.Rate))
	}
	return errors.Join(errs...)
}
