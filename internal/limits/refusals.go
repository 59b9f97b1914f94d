// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// logEvery is how often one kind of refusal is logged at the most: who knocks must not fill the log.
const logEvery = 10 * time.Second

// Refusals counts what was refused, and logs each kind now and then. Kinds are the program's words, so that there are few.
type Refusals struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[string]*refusal
}

type refusal struct {
	total, told uint64
	toldAt      time.Time
}

// NewRefusals logs to log.
func NewRefusals(log *slog.Logger) *Refusals {
	return &Refusals{log: log, kinds: make(map[string]*refusal)}
}

// Refused counts that what was refused to somebody at address. More is for the log: keys and values, as in slog.
func (r *Refusals) Refused(what string, address netip.Prefix, more ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[what]
	if k == nil {
		k = &refusal{}
		r.kinds[what] = k
	}
	k.total++
	now := time.Now()
	if k.told > 0 && now.Sub(k.toldAt) < logEvery {
		return
	}
	r.log.Warn("refused a "+what, append([]any{"address", address.Addr(), "since_last", k.total - k.told, "in_all", k.total}, more...)...)
	k.told, k.toldAt = k.total, now
}

// ByKind is how much was refused of each kind.
func (r *Refusals) ByKind() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	kinds := make(map[string]uint64, len(r.kinds))
	for what, k := range r.kinds {
		kinds[what] = k.total
	}
	return kinds
}

// Total is how much was refused, of all kinds.
func (r *Refusals) Total() (n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.kinds {
		n += k.total
	}
	return n
}
