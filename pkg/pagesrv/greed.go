// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// A destination needs each page once, or twice where a fault overtakes the sweep, and after a lost lane what was in flight
// once more. One that asks for much more takes CPUs from the migrations of others, whose lanes are served by the same ones.
// It is not refused, for it may have lost what it got; it is served more slowly than a migration could be of use.
const (
	// fairShare is how often all of the RAM may be asked for at full speed, and fairAllowance how many bytes besides.
	fairShare     = 4
	fairAllowance = 256 << 20
	// greedRate is what is served beyond, in bytes a second, all lanes of an export together.
	greedRate = 32 << 20
	// leastAsked is what a request counts at least, in bytes: one without pages costs too.
	leastAsked = 4096
)

// greed says what an export's lanes have asked for.
type greed struct {
	fair    uint64 // bytes
	asked   atomic.Uint64
	limiter *rate.Limiter
}

func newGreed(ram *RAM) *greed {
	g := &greed{fair: fairAllowance, limiter: rate.NewLimiter(greedRate, pagewire.MaxRequestedBytes)}
	for i := range ram.blocks {
		g.fair += fairShare * ram.blocks[i].Size
	}
	return g
}

// take counts a request for so many bytes, and waits where it is too much. waited says whether it was. The error is why
// ctx ended.
func (g *greed) take(ctx context.Context, bytes uint64) (waited bool, err error) {
	bytes = max(bytes, leastAsked)
	if g.asked.Add(bytes) <= g.fair {
		return false, nil
	}
	return true, g.limiter.WaitN(ctx, int(bytes))
}
