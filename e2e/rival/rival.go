// SPDX-License-Identifier: Apache-2.0

// Package rival migrates a lab's VM by QEMU's own post-copy, so that migrated can be measured against what its users
// would otherwise use: the same VM, on the same hosts, in the same run.
package rival

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// port is the port at which the destination QEMU listens, in the lab's network.
const port = "7700"

// precopy is how long all of the memory would take before the switch. QEMU is told to switch once it says that it
// sends. Without this limit, all of a small memory could have arrived before that command, and QEMU would complete
// without post-copy. After the switch only the cable limits the rate.
const precopy = time.Minute

// Options are the variants of QEMU's post-copy.
type Options struct {
	Preempt bool // the capability postcopy-preempt: urgent pages on a channel of their own
	// KeepSource leaves the source QEMU, stopped, for the caller to end.
	KeepSource bool
	// Credentials returns the directory of a host's certificates, under the names that QEMU looks for; nil: the migration
	// is not encrypted. Both sides ask for the other's certificate.
	Credentials func(*lab.Host) string
	// Latencies makes the destination count how long its faults take. It needs QEMU 10.1 or later.
	Latencies bool
}

// Result has the figures of the migration.
type Result struct {
	Switch    lab.Switch    // the source's STOP event, the destination's RESUME event
	Downtime  time.Duration // from one to the other
	Residency time.Duration // from RESUME to the end of the migration
	Bytes     uint64        // as the source's query-migrate counts them
	// Loading is when the destination had the devices' state and began to load it, by its MIGRATION event.
	Loading time.Time
	// Latencies is how many faults took [2^N, 2^(N+1)) µs, for each N from 0 on; nil without Options.Latencies.
	Latencies []uint64
}

// Migrate moves the VM that c describes from one host to the other. It starts the destination QEMU itself, switches to
// post-copy at once, and ends the source QEMU at the end, unless that is to be kept.
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
	states, arrivals := source.Subscribe("MIGRATION"), destination.Subscribe("MIGRATION")

	if err := configure(ctx, to, destination, c, o, "server"); err != nil {
		return Result{}, err
	}
	if err := configure(ctx, from, source, c, o, "client"); err != nil {
		return Result{}, err
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
	loading, err := awaitLoading(ctx, arrivals)
	if err != nil {
		return Result{}, err
	}
	latencies, err := latencies(ctx, destination, o)
	if err != nil {
		return Result{}, err
	}
	if o.Credentials != nil { // the VM may next be moved without TLS
		off := map[string]any{"tls-creds": ""}
		if err := destination.Do(ctx, "migrate-set-parameters", off, nil); err != nil {
			return Result{}, err
		}
		if err := destination.Do(ctx, "object-del", map[string]any{"id": credentialsID}, nil); err != nil {
			return Result{}, err
		}
	}
	if !o.KeepSource {
		if err := source.Do(ctx, "quit", nil, nil); err != nil {
			return Result{}, err
		}
	}
	s := lab.Switch{Stopped: stopped.Time, Resumed: resumed.Time}
	return Result{
		Switch: s, Downtime: s.Downtime(), Residency: ended.Sub(s.Resumed), Bytes: figures.RAM.Transferred,
		Loading: loading.Time, Latencies: latencies,
	}, nil
}

// awaitLoading waits for the first event by which a destination says that it runs post-copy. The code that loads the
// devices sends it before it loads them; from QEMU 10.2 on the state is postcopy-device.
func awaitLoading(ctx context.Context, states *qmp.Subscription) (qmp.Event, error) {
	for {
		e, err := lab.Next(ctx, states)
		if err != nil {
			return e, fmt.Errorf("waiting for the destination to run post-copy: %w", err)
		}
		status, err := statusOf(e)
		if err != nil || strings.HasPrefix(status, "postcopy-") {
			return e, err
		}
	}
}

// latencies returns the faults that the destination has counted, by time.
func latencies(ctx context.Context, destination *qmp.Client, o Options) ([]uint64, error) {
	if !o.Latencies {
		return nil, nil
	}
	var counted struct {
		Latencies []uint64 `json:"postcopy-latency-dist"`
	}
	if err := destination.Do(ctx, "query-migrate", nil, &counted); err != nil {
		return nil, err
	}
	if counted.Latencies == nil {
		return nil, errors.New("this QEMU does not say how long faults took: that needs 10.1 or later")
	}
	return counted.Latencies, nil
}

// credentialsID is the name of the object that has the certificates.
const credentialsID = "rivaltls"

// configure sets up the QEMU of one host; endpoint is its side of TLS.
func configure(
	ctx context.Context, h *lab.Host, client *qmp.Client, c lab.VMConfig, o Options, endpoint string,
) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	// A QEMU to which its VM came with preempt still has preempt on, so it is set either way.
	capabilities := []capability{{"events", true}, {"postcopy-ram", true}, {"postcopy-preempt", o.Preempt}}
	if o.Latencies {
		capabilities = append(capabilities, capability{"postcopy-blocktime", true})
	}
	if err := client.Do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": capabilities}, nil); err != nil {
		return err
	}
	parameters := map[string]any{
		"max-bandwidth": uint64(c.MemoryMiB) << 20 / uint64(precopy.Seconds()), "max-postcopy-bandwidth": 0,
	}
	if o.Credentials != nil {
		object := map[string]any{
			"qom-type": "tls-creds-x509", "id": credentialsID, "dir": o.Credentials(h), "endpoint": endpoint,
			"verify-peer": true,
		}
		if err := client.Do(ctx, "object-add", object, nil); err != nil {
			return fmt.Errorf("certificates for QEMU's TLS: %w", err)
		}
		parameters["tls-creds"] = credentialsID
	}
	return client.Do(ctx, "migrate-set-parameters", parameters, nil)
}

func awaitState(ctx context.Context, states *qmp.Subscription, want string) error {
	for {
		e, err := lab.Next(ctx, states)
		if err != nil {
			return fmt.Errorf("waiting for QEMU's migration to be %s: %w", want, err)
		}
		switch status, err := statusOf(e); {
		case err != nil:
			return err
		case status == want:
			return nil
		case slices.Contains([]string{"failed", "cancelled", "completed"}, status):
			return fmt.Errorf("QEMU's own migration is %s instead of %s", status, want)
		}
	}
}

// statusOf returns the state in a MIGRATION event.
func statusOf(e qmp.Event) (string, error) {
	var data struct {
		Status string `json:"status"`
	}
	err := json.Unmarshal(e.Data, &data)
	return data.Status, err
}
