// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// A destination needs each page once, or twice where a fault overtakes the sweep. After a lost lane it needs once more
// what was in flight. A destination that asks for much more takes CPUs from the migrations of others, whose lanes the
// same CPUs serve. It is not refused, because it may have lost data, but served at quotaRate, too slowly for a useful
// migration.
const (
	// fairShare is how often all of the RAM may be asked for at full speed, and fairAllowance how many bytes in addition.
	fairShare     = 4
	fairAllowance = 256 << 20
	// quotaRate is how much is served beyond that, in bytes a second, by all lanes of an export together.
	quotaRate = 32 << 20
	// leastAsked is what a request counts at least, in bytes: a request without pages costs something, too.
	leastAsked = 4096
)

// quota says what an export's lanes have asked for.
type quota struct {
	fair    uint64 // bytes
	asked   atomic.Uint64
	limiter *rate.Limiter
}

func newQuota(ram *RAM) *quota {
	q := &quota{fair: fairAllowance, limiter: rate.NewLimiter(quotaRate, pagewire.MaxRequestedBytes)}
	for i := range ram.blocks {
		q.fair += fairShare * ram.blocks[i].Size
	}
	return q
}

// take counts a request for that many bytes. Beyond the fair share it waits, and waited is true. The error is the cause
// of ctx.
func (q *quota) take(ctx context.Context, bytes uint64) (waited bool, err error) {
	bytes = max(bytes, leastAsked)
	if q.asked.Add(bytes) <= q.fair {
		return false, nil
	}
	return true, q.limiter.WaitN(ctx, int(bytes))
}
