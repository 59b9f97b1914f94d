// SPDX-License-Identifier: Apache-2.0

// Package rival migrates a lab's VM by QEMU's own post-copy, so that migrated
// can be measured against what its users would otherwise pick: the same VM, on
// the same hosts, in the same run.
package rival

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// port is where the destination QEMU listens, in the lab's network.
const port = "7700"

// unlimited is the bandwidth given to QEMU, bytes a second: the cable's own.
const unlimited = 100 << 30

// Options are the variants of QEMU's post-copy.
type Options struct {
	Preempt bool // the capability postcopy-preempt: urgent pages on a channel of their own
	// KeepSource leaves the source QEMU, stopped, for the caller to end.
	KeepSource bool
}

// Result is what the migration did.
type Result struct {
	Switch    lab.Switch    // the source's STOP event, the destination's RESUME event
	Downtime  time.Duration // from one to the other
	Residency time.Duration // from RESUME to the end of the migration
	Bytes     uint64        // as the source's query-migrate counts them
}

// Migrate moves the VM that c describes from one host to the other. It starts
// the destination QEMU itself, switches to post-copy at once, and ends the
// source QEMU when all is over, unless it is to be kept.
func Migrate(ctx context.Context, from, to *lab.Host, c lab.VMConfig, o Options) (Result, error) {
	if _, err := to.StartVM(ctx, c, "-incoming", "defer"); err != nil {
		return Result{}, err
	}
	source, err := from.QMP(ctx)
	if err != nil {
		return Result{}, err
	}
	defer source.Disconnect() //nolint:errcheck // nothing is pending
	destination, err := to.QMP(ctx)
	if err != nil {
		return Result{}, err
	}
	defer destination.Disconnect() //nolint:errcheck // nothing is pending
	stops, resumes := source.Subscribe("STOP"), destination.Subscribe("RESUME")
	states := source.Subscribe("MIGRATION")

	for _, client := range []*qmp.Client{destination, source} {
		if err := configure(ctx, client, o); err != nil {
			return Result{}, err
		}
	}
	uri := map[string]any{"uri": "tcp:" + to.Addr + ":" + port}
	if err := destination.Do(ctx, "migrate-incoming", uri, nil); err != nil {
		return Result{}, err
	}
	if err := source.Do(ctx, "migrate", uri, nil); err != nil {
		return Result{}, err
	}
	if err := awaitState(ctx, states, "active"); err != nil {
		return Result{}, err
	}
	if err := source.Do(ctx, "migrate-start-postcopy", nil, nil); err != nil {
		return Result{}, err
	}
	if err := awaitState(ctx, states, "completed"); err != nil {
		return Result{}, err
	}
	ended := time.Now()
	stopped, err := lab.Next(ctx, stops)
	if err != nil {
		return Result{}, err
	}
	resumed, err := lab.Next(ctx, resumes)
	if err != nil {
		return Result{}, err
	}
	var figures struct {
		RAM struct {
			Transferred uint64 `json:"transferred"`
		} `json:"ram"`
	}
	if err := source.Do(ctx, "query-migrate", nil, &figures); err != nil {
		return Result{}, err
	}
	if !o.KeepSource {
		if err := source.Do(ctx, "quit", nil, nil); err != nil {
			return Result{}, err
		}
	}
	s := lab.Switch{Stopped: stopped.Time, Resumed: resumed.Time}
	return Result{
		Switch: s, Downtime: s.Downtime(), Residency: ended.Sub(s.Resumed), Bytes: figures.RAM.Transferred,
	}, nil
}

func configure(ctx context.Context, client *qmp.Client, o Options) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	capabilities := []capability{{"events", true}, {"postcopy-ram", true}}
	if o.Preempt {
		capabilities = append(capabilities, capability{"postcopy-preempt", true})
	}
	if err := client.Do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": capabilities}, nil); err != nil {
		return err
	}
	return client.Do(ctx, "migrate-set-parameters", map[string]any{
		"max-bandwidth": uint64(unlimited), "max-postcopy-bandwidth": 0,
	}, nil)
}

func awaitState(ctx context.Context, states *qmp.Subscription, want string) error {
	for {
		e, err := lab.Next(ctx, states)
		if err != nil {
			return fmt.Errorf("waiting for QEMU's migration to be %s: %w", want, err)
		}
		var data struct {
			Status string `json:"status"`
		}
		if err := json.Unmarshal(e.Data, &data); err != nil {
			return err
		}
		switch data.Status {
		case want:
			return nil
		case "failed", "cancelled", "completed":
			return fmt.Errorf("QEMU's own migration is %s instead of %s", data.Status, want)
		}
	}
}
