// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// logEvery is the shortest time between two log lines about one kind of refusal. Callers that are refused must not be
// able to fill the log.
const logEvery = 10 * time.Second

// A Kind says what is refused, and why. It is a part of log lines and a label of metrics.
type Kind string

// Kinds of refusals.
const (
	Caller       Kind = "caller"
	VM           Kind = "VM"
	AllConnected Kind = "connection: too many are open"
	Connected    Kind = "connection: too many of its address are open"
	AllShaking   Kind = "connection: too many have not finished their handshake"
	Shaking      Kind = "connection: too many of its address have not finished their handshake"
	Connecting   Kind = "connection: its address makes them too fast"
	Calling      Kind = "call: its address makes too many"
	Moving       Kind = "migration: too many are under way"
	Watching     Kind = "watcher: too many follow the list"
	Foreign      Kind = "request: a page of another site sent it, or it is for a name that this host does not have"
)

var kinds = []Kind{
	Caller, VM, AllConnected, Connected, AllShaking, Shaking, Connecting, Calling, Moving, Watching, Foreign,
}

// Refusals counts what was refused, and logs each kind now and then.
type Refusals struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[Kind]*refusal // has all kinds from the beginning, so that metrics show zeros for those without refusals
}

// A refusal has the counts of one kind.
type refusal struct {
	total    uint64
	logged   uint64 // total when it was last logged
	loggedAt time.Time
}

// NewRefusals returns Refusals that log to log.
func NewRefusals(log *slog.Logger) *Refusals {
	r := &Refusals{log: log, kinds: make(map[Kind]*refusal, len(kinds))}
	for _, kind := range kinds {
		r.kinds[kind] = new(refusal)
	}
	return r
}

// Refused counts a refusal of a caller at address, and logs it unless logEvery has not passed. more are keys and values
// for the log, as in slog.
func (r *Refusals) Refused(what Kind, address netip.Prefix, more ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.kinds[what]
	k.total++
	now := time.Now()
	if k.logged > 0 && now.Sub(k.loggedAt) < logEvery {
		return
	}
	attributes := []any{"address", address.Addr(), "since_last", k.total - k.logged, "in_all", k.total}
	r.log.Warn("refused a "+string(what), append(attributes, more...)...)
	k.logged, k.loggedAt = k.total, now
}

// ByKind returns the number of refusals of each kind.
func (r *Refusals) ByKind() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	kinds := make(map[string]uint64, len(r.kinds))
	for what, k := range r.kinds {
		kinds[string(what)] = k.total
	}
	return kinds
}

// Total returns the number of refusals of all kinds.
func (r *Refusals) Total() (n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.kinds {
		n += k.total
	}
	return n
}
