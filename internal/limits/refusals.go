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

// A Kind is what is refused, and why.
type Kind string

// All that is refused.
const (
	Caller       Kind = "caller"
	VM           Kind = "VM"
	AllConnected Kind = "connection: as many are open as this daemon serves"
	Connected    Kind = "connection: its address has as many open as it may"
	AllShaking   Kind = "connection: too many have not finished their handshake"
	Shaking      Kind = "connection: too many of its address have not finished their handshake"
	Connecting   Kind = "connection: its address makes them too fast"
	Calling      Kind = "call: its address makes too many"
	Moving       Kind = "migration: too many are under way"
)

var kinds = []Kind{Caller, VM, AllConnected, Connected, AllShaking, Shaking, Connecting, Calling, Moving}

// Refusals counts what was refused, and logs each kind now and then.
type Refusals struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[Kind]*refusal // all of them: a rate of what was never counted before cannot be told
}

type refusal struct {
	total, told uint64
	toldAt      time.Time
}

// NewRefusals logs to log.
func NewRefusals(log *slog.Logger) *Refusals {
	r := &Refusals{log: log, kinds: make(map[Kind]*refusal, len(kinds))}
	for _, kind := range kinds {
		r.kinds[kind] = new(refusal)
	}
	return r
}

// Refused counts that what was refused to somebody at address. More is for the log: keys and values, as in slog.
func (r *Refusals) Refused(what Kind, address netip.Prefix, more ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[what]
	k.total++
	now := time.Now()
	if k.told > 0 && now.Sub(k.toldAt) < logEvery {
		return
	}
	said := []any{"address", address.Addr(), "since_last", k.total - k.told, "in_all", k.total}
	r.log.Warn("refused a "+string(what), append(said, more...)...)
	k.told, k.toldAt = k.total, now
}

// ByKind is how much was refused of each kind.
func (r *Refusals) ByKind() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	kinds := make(map[string]uint64, len(r.kinds))
	for what, k := range r.kinds {
		kinds[string(what)] = k.total
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
