// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

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
