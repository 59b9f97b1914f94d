// SPDX-License-Identifier: Apache-2.0

package inject_test

import (
	"context"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// watch registers memory of process pid, which does not co-operate. Its accesses to missing pages then wait for this
// process.
func watch(ctx context.Context, pid int, memory uffd.Range) (*uffd.UFFD, error) {
	taken, err := inject.Take(ctx, pid, inject.TakeOptions{})
	if err != nil {
		return nil, err // a *inject.TakeError, whose text says what to do
	}
	if _, _, err := taken.UFFD.API(uffd.FeatureEventRemove); err != nil {
		_ = taken.UFFD.Close()
		return nil, err
	}
	if _, err := taken.UFFD.Register(memory, uffd.ModeMissing); err != nil {
		_ = taken.UFFD.Close()
		return nil, err
	}
	return taken.UFFD, nil // next: read its messages and answer with Copy
}

// The example takes a userfaultfd from a process that does not co-operate.
func ExampleTake() {
	_ = watch
}
