// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu/qom"
)

const (
	objects     = "/objects/"
	fileBackend = "memory-backend-file"
	// discardData makes QEMU empty the file when it ends (file_backend_unparent in QEMU's backends/hostmem-file.c).
	discardData = "discard-data"
)

// KeepWhenQEMUEnds switches discard-data off for all memory backends that have it on, and returns their IDs. Otherwise
// a QEMU that ends while its memory is still needed empties its files, and readers take that for zeros. On an error
// some of the backends may have been switched.
func (mem *Memory) KeepWhenQEMUEnds(ctx context.Context) (changed []string, err error) {
	children, err := qom.Children(ctx, mem.qmp, objects)
	if err != nil {
		return nil, err
	}
	for _, c := range children {
		if c.Class() != fileBackend {
			continue
		}
		var on bool
		if err := qom.Property(ctx, mem.qmp, objects+c.Name, discardData, &on); err != nil {
			return changed, err
		}
		if !on {
			continue
		}
		if err := mem.setDiscard(ctx, c.Name, false); err != nil {
			return changed, err
		}
		changed = append(changed, c.Name)
	}
	return changed, nil
}

// DiscardWhenQEMUEnds switches discard-data on again for what KeepWhenQEMUEnds has returned.
func (mem *Memory) DiscardWhenQEMUEnds(ctx context.Context, changed []string) error {
	var errs []error
	for _, id := range changed {
		errs = append(errs, mem.setDiscard(ctx, id, true))
	}
	return errors.Join(errs...)
}

func (mem *Memory) setDiscard(ctx context.Context, id string, on bool) error {
	property := map[string]any{"path": objects + id, "property": discardData, "value": on}
	if err := mem.qmp.Do(ctx, "qom-set", property, nil); err != nil {
		return fmt.Errorf("RAM %q: set %s: %w", id, discardData, err)
	}
	return nil
}
