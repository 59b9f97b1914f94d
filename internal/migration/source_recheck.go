// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/migrated-vm/migrated/internal/machine"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// checkUnchanged refuses a VM that has changed since prepare looked at it, because its operator may change it between
// prepare and Start. The VM runs meanwhile.
func (s *Source) checkUnchanged(ctx context.Context) error {
	tasks, err := check.Tasks(ctx, s.vm)
	if err != nil {
		return qemuQueryError("source", err)
	}
	now, err := machine.Describe(ctx, s.vm)
	if err != nil {
		return qemuQueryError("source", err)
	}
	return refusalOf("the VM has changed since the migration was prepared",
		append(tasks, machine.Changed(s.description, now)...))
}

// checkNoNewJob returns an error if one of these JOB_STATUS_CHANGE events says that a job has begun.
func checkNoNewJob(events *qmp.Subscription) error {
	for len(events.Events()) > 0 {
		event := <-events.Events()
		var job struct {
			ID     string `json:"id"`
			Status string `json:"status"`
		}
		if err := json.Unmarshal(event.Data, &job); err != nil {
			return fmt.Errorf("QEMU's event %s %s: %w", event.Name, event.Data, err)
		}
		if slices.Contains([]string{"created", "running"}, job.Status) {
			return withRemedy(
				fmt.Errorf("the job %q was begun while the VM was being moved: it is this QEMU's alone and would be lost", job.ID),
				"wait until it has ended, or end it with QMP job-cancel, then migrate the VM again")
		}
	}
	return nil
}

// refusalOf returns an error that has every failed result, or nil if none failed. what begins its message.
func refusalOf(what string, results []check.Result) error {
	var reasons []error
	remedy := ""
	for _, result := range results {
		if result.Status != check.Failed {
			continue
		}
		reasons = append(reasons, fmt.Errorf("%s: %s", result.Subject, result.Detail))
		if remedy == "" {
			remedy = result.Remedy
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	refused := fmt.Errorf("%s: %w", what, errors.Join(reasons...))
	return withRemedy(withReason(refused, migratedv1.Reason_REASON_VM_REFUSED), remedy)
}
