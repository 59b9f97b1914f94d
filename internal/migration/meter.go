// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// rateWindow is how far back the transfer rate looks.
const rateWindow = time.Second

// A meter turns the engine's counters into what the API shows. Its zero value
// is ready.
type meter struct {
	mu       sync.Mutex
	started  time.Time // of the VM on this host; zero before
	downtime time.Duration
	samples  []sample // within rateWindow, oldest first
}

type sample struct {
	at      time.Time
	bytes   uint64
	swept   uint64 // of bytes
	present uint64
}

// switched says that the VM runs here since the given time, after a downtime of d.
func (m *meter) switched(since time.Time, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.started, m.downtime = since, d
}

// residency is the time from the switch to the last page, zero before that.
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

func (m *meter) progress(s postcopy.Stats) *migratedv1.Progress {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := &migratedv1.Progress{
		PagesTotal: s.PagesTotal, PagesPresent: s.PagesPresent, PagesZero: s.PagesZero,
		BytesTotal: s.BytesTotal, BytesOnWire: s.BytesReceived, Faults: s.Faults,
		FaultP50: durationpb.New(s.FaultP50), FaultP99: durationpb.New(s.FaultP99), FaultMax: durationpb.New(s.FaultMax),
		PagesGuessed: s.Guessed, GuessHits: s.GuessHits, Bandwidth: s.Bandwidth,
		BytesDiscarded: s.Discarded, PagesTouched: s.PagesTouched, PagesUnexplained: s.PagesUnexplained,
	}
	if m.started.IsZero() {
		return p
	}
	p.Downtime = durationpb.New(m.downtime)
	if s.PagesPresent == s.PagesTotal {
		p.Residency = durationpb.New(m.residencyLocked(s))
		return p
	}
	now := sample{at: time.Now(), bytes: s.BytesReceived, swept: s.BytesReceived - s.DemandBytes, present: s.PagesPresent}
	m.samples = append(m.samples, now)
	for len(m.samples) > 2 && now.at.Sub(m.samples[1].at) >= rateWindow {
		m.samples = m.samples[1:]
	}
	past := m.samples[0]
	if elapsed := now.at.Sub(past.at).Seconds(); elapsed > 0 {
		p.BytesPerSecond = float64(now.bytes-past.bytes) / elapsed
		p.SweepBytesPerSecond = float64(now.swept-past.swept) / elapsed
		if pages := float64(now.present-past.present) / elapsed; pages > 0 {
			left := float64(s.PagesTotal-s.PagesPresent) / pages
			p.TimeLeft = durationpb.New(time.Duration(left * float64(time.Second)))
		}
	}
	return p
}
