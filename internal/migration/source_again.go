// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/migrated-vm/migrated/internal/machine"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// askAgain refuses what has come about since the VM was looked at: the time between Prepare and Start is its
// operator's. The VM runs meanwhile.
func (s *Source) askAgain(ctx context.Context) error {
	tasks, err := qemu.CheckTasks(ctx, s.vm)
	if err != nil {
		return askQEMU("source", err)
	}
	now, err := machine.Describe(ctx, s.vm)
	if err != nil {
		return askQEMU("source", err)
	}
	return refuse("the VM is another than when it was prepared", append(tasks, machine.Changed(s.description, now)...))
}

// newJob is an error if one of these events, JOB_STATUS_CHANGE, says that a job has begun.
func newJob(events *qmp.Subscription) error {
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

// refuse is an error with every result that failed, nil where none did.
func refuse(what string, results []qemu.Result) error {
	var reasons []error
	remedy := ""
	for _, result := range results {
		if result.Status != qemu.Failed {
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
