// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestRetriesWhatCanBeMended: the destination fetches again after every error that an operator can mend, also one that
// nobody has foreseen. An error is final only if the VM's memory is not where its pages would be put.
func TestRetriesWhatCanBeMended(t *testing.T) {
	d := &Destination{cfg: DestinationConfig{Request: &migratedv1.PrepareIncomingRequest{Id: "m1"}}}
	for _, err := range []error{
		postcopy.ErrLaneLost, postcopy.ErrNoMemory, postcopy.ErrProtocol, postcopy.ErrRangeGone, postcopy.ErrForeignFault,
		unix.EMFILE, unix.EIO, errors.New("something else"),
	} {
		if retry, remedy := d.canRetry(fmt.Errorf("post-copy: %w", err)); !retry || remedy == "" {
			t.Errorf("%v: tried again: %v, remedy: %q", err, retry, remedy)
		}
	}
	for _, err := range []error{postcopy.ErrProcessGone, postcopy.ErrMoved, &postcopy.ForkError{Child: uffd.FromFD(-1)}} {
		if retry, _ := d.canRetry(fmt.Errorf("post-copy: %w", err)); retry {
			t.Errorf("%v: tried again", err)
		}
	}
}

// TestBackoffGrows: a source whose lanes open and bring nothing is soon asked no more often than one that is down.
func TestBackoffGrows(t *testing.T) {
	backoff := time.Duration(0)
	for i, outage := 0, time.Duration(0); outage < time.Hour; i++ {
		if backoff = nextBackoff(backoff, outage); i > 8 && backoff < longestBackoff || backoff > outageBackoff {
			t.Fatalf("the backoff is %v after %v", backoff, outage)
		}
		outage += backoff
	}
	if backoff != outageBackoff {
		t.Errorf("the backoff is %v in the end", backoff)
	}
}

// TestUnreadablePagesAreNamed: where the source cannot read a page, the operator is not told to restore the network.
func TestUnreadablePagesAreNamed(t *testing.T) {
	d := &Destination{cfg: DestinationConfig{Request: &migratedv1.PrepareIncomingRequest{Id: "m1"}}}
	said, err := status.New(codes.DataLoss, "cannot read the RAM of the VM").WithDetails(
		&migratedv1.MigrationError{Reason: migratedv1.Reason_REASON_PAGES_UNREADABLE})
	if err != nil {
		t.Fatal(err)
	}
	lost := fmt.Errorf("bulk lane: %w: %w", postcopy.ErrLaneLost, said.Err())
	if reason := reasonOf(lost); reason != migratedv1.Reason_REASON_PAGES_UNREADABLE {
		t.Errorf("the reason is %v", reason)
	}
	if retry, remedy := d.canRetry(lost); !retry || !strings.Contains(remedy, "kernel log of the source's host") {
		t.Errorf("tried again: %v, remedy: %q", retry, remedy)
	}
}
