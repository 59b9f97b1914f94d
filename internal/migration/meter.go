// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// rateWindow is the period over which the transfer rate is measured.
const rateWindow = time.Second

// A meter turns the engine's counters into what the API shows. The zero value is ready for use.
type meter struct {
	mu       sync.Mutex
	started  time.Time // when the VM started to run on this host; zero: not yet
	downtime time.Duration
	samples  []sample // within rateWindow, oldest first
	bestRate float64  // the highest rate, bytes a second
	curve    curve    // since started
}

type sample struct {
	at      time.Time
	bytes   uint64
	swept   uint64 // bytes that the sweep brought
	present uint64
	faults  uint64
}

// curvePoints bounds the points of a curve. They are enough for a figure on a page.
const curvePoints = 128

// A curve is a series of samples at equal distances. When it is full, every second one is dropped and the distance
// doubles.
type curve struct {
	points   []sample
	interval time.Duration // least distance between two points
}

func (c *curve) add(s sample) {
	if n := len(c.points); n > 0 && s.at.Sub(c.points[n-1].at) < c.interval {
		return
	}
	if len(c.points) == curvePoints {
		half := c.points[:0]
		for i := 0; i < curvePoints; i += 2 {
			half = append(half, c.points[i])
		}
		c.points, c.interval = half, max(2*c.interval, 2*progressInterval)
	}
	c.points = append(c.points, s)
}

// switched records that the VM runs here since the given time, after a downtime of d.
func (m *meter) switched(since time.Time, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.started, m.downtime = since, d
}

// residency returns the time from the switch to the last page; zero before that.
func (m *meter) residency(s postcopy.Stats) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.residencyLocked(s)
}

func (m *meter) residencyLocked(s postcopy.Stats) time.Duration {
	if m.started.IsZero() || s.LastPage.IsZero() {
		return 0
	}
	return max(0, s.LastPage.Sub(m.started))
}

func sampleOf(s postcopy.Stats) sample {
	return sample{
		at: time.Now(), bytes: s.BytesReceived, swept: s.BytesReceived - s.DemandBytes,
		present: s.PagesPresent, faults: s.Faults,
	}
}

// report adds what only the meter knows: the samples up to s and the highest rate. If the transfer was too short to
// be measured, the highest rate is the average.
func (m *meter) report(s postcopy.Stats, to *migratedv1.IncomingPages) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.started.IsZero() {
		return
	}
	points := m.curve.points
	last := sampleOf(s)
	if took := m.residencyLocked(s); took > 0 {
		last.at = m.started.Add(took)
		m.bestRate = max(m.bestRate, float64(s.BytesReceived)/took.Seconds())
	}
	for _, p := range append(points[:len(points):len(points)], last) {
		to.Samples = append(to.Samples, &migratedv1.PageSample{
			SinceSwitch:  durationpb.New(max(0, p.at.Sub(m.started))),
			PagesPresent: p.present, BytesOnWire: p.bytes, Faults: p.faults,
		})
	}
	to.BestBytesPerSecond = m.bestRate
}

func (m *meter) progress(s postcopy.Stats) *migratedv1.Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &migratedv1.Progress{
		PagesTotal: s.PagesTotal, PagesPresent: s.PagesPresent, PagesZero: s.PagesZero,
		BytesTotal: s.BytesTotal, BytesOnWire: s.BytesReceived, Faults: s.Faults,
		FaultP50: durationpb.New(s.FaultP50), FaultP99: durationpb.New(s.FaultP99), FaultMax: durationpb.New(s.FaultMax),
		PagesGuessed: s.Guessed, GuessHits: s.GuessHits, Bandwidth: s.Bandwidth,
		BytesDiscarded: s.Discarded, PagesTouched: s.PagesTouched, PagesUnexplained: s.PagesUnexplained,
		PagesLost: s.PagesLost, BulkLanes: uint32(s.BulkLanes),
	}
	if m.started.IsZero() {
		return p
	}
	p.Downtime = durationpb.New(m.downtime)
	if s.PagesPresent == s.PagesTotal {
		p.Residency = durationpb.New(m.residencyLocked(s))
		return p
	}
	now := sampleOf(s)
	m.curve.add(now)
	m.samples = append(m.samples, now)
	for len(m.samples) > 2 && now.at.Sub(m.samples[1].at) >= rateWindow {
		m.samples = m.samples[1:]
	}
	past := m.samples[0]
	if elapsed := now.at.Sub(past.at).Seconds(); elapsed > 0 {
		p.BytesPerSecond = float64(now.bytes-past.bytes) / elapsed
		if now.at.Sub(past.at) >= progressInterval/2 {
			m.bestRate = max(m.bestRate, p.GetBytesPerSecond())
		}
		p.SweepBytesPerSecond = float64(now.swept-past.swept) / elapsed
		if pages := float64(now.present-past.present) / elapsed; pages > 0 {
			left := float64(s.PagesTotal-s.PagesPresent) / pages
			p.TimeLeft = durationpb.New(time.Duration(left * float64(time.Second)))
		}
	}
	return p
}
