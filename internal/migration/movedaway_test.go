// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"strings"
	"testing"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestMovedAway: what is left of a VM counts as that only if all of the VM has left and its QEMU says that it stands
// still. Package daemon has the other cases.
func TestMovedAway(t *testing.T) {
	s := committed(t)
	pid := s.qemu.Process.Pid
	away, problem, err := s.records.MovedAway(t.Context(), pid)
	if away || err != nil || !strings.Contains(Remedy(problem), "migrated fallback m1") {
		t.Errorf("after a failure behind the commit: %t, %v (%s), %v", away, problem, Remedy(problem), err)
	}
	if err := s.records.Complete("m1", migratedv1.Reason_REASON_UNSPECIFIED, nil); err != nil {
		t.Fatal(err)
	}
	if away, problem, err = s.records.MovedAway(t.Context(), pid); !away || problem != nil || err != nil {
		t.Errorf("complete: %t, %v, %v", away, problem, err)
	}
	late, cancel := context.WithCancel(t.Context())
	cancel()
	away, problem, err = s.records.MovedAway(late, pid)
	if away || err != nil || problem == nil || Remedy(problem) == "" {
		t.Errorf("QEMU does not answer: %t, %v (%s), %v", away, problem, Remedy(problem), err)
	}
	s.continueAnyway(t)
	if away, problem, err = s.records.MovedAway(t.Context(), pid); away || problem != nil || err != nil {
		t.Errorf("continued here: %t, %v, %v", away, problem, err)
	}
}
