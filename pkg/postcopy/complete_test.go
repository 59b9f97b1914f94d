// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestLastEventComesLate: at the end, when all memory is in, a thread that is about to give memory up gets the
// processor late. Its event is read, however late it comes.
func TestLastEventComesLate(t *testing.T) {
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: 8}}, Options{})
	var gives uffdtest.Pending
	asked := 0
	if err := settle(context.Background(), g.uffd, func() bool {
		if asked++; asked == 2*goneTries {
			gives = g.child.Go(uffdtest.Punch(g.blocks[0].page(1)))
			gives.WaitWaiting()
		}
		return asked < 2*goneTries || !gives.Ended()
	}); err != nil {
		t.Fatal(err)
	}
	gives.JoinOK()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := settle(ctx, g.uffd, func() bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
}
