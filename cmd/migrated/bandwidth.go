// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

type bandwidthCmd struct {
	ID    string `arg:"" predictor:"migration" help:"The migration."`
	Limit string `arg:"" placeholder:"BYTES/S" help:"Bytes a second as QEMU writes them, 500M for 500 MiB; or none."`
}

func (bandwidthCmd) Help() string {
	return `Changes the bandwidth limit of a running migration, for memory that the VM does not wait for: bytes a ` +
		`second, not bits, with K, M, G or T for powers of 1024, at least 64K. Pages that the VM waits for are ` +
		`neither delayed nor counted: a low limit only makes the migration take longer. Works on either host; the ` +
		`daemons may have lower limits of their own.

Examples:

    # Leave room for others
    migrated bandwidth db-1 200M

    # Finish as fast as the link allows
    migrated bandwidth db-1 none`
}

func (b *bandwidthCmd) Run(a *app) error {
	limit, err := parseBandwidth(b.Limit)
	if err != nil {
		return &failure{exit: exitUsage, message: err.Error(), remedy: `see "migrated bandwidth --help" for examples`}
	}
	return a.withClient(func(ctx context.Context, c *daemonClient) error {
		answer, err := c.SetBandwidth(ctx, &migratedv1.SetBandwidthRequest{Id: b.ID, Bandwidth: limit})
		if err != nil {
			return c.explain(b.ID, err)
		}
		holds := answer.GetBandwidth()
		switch {
		case a.json:
			return a.printJSON(answer)
		case holds != limit:
			a.printf("%s: %s, the limit of a daemon\n", b.ID, limitText(holds))
		default:
			a.printf("%s: %s\n", b.ID, limitText(holds))
		}
		return nil
	})
}

// parseBandwidth parses a limit. It returns 0, no limit, if the flag was not given.
func parseBandwidth(text string) (uint64, error) {
	if text == "" {
		return 0, nil
	}
	return bandwidth.Parse(text)
}

// limitText returns a limit as "500.0 MiB/s".
func limitText(limit uint64) string {
	if limit == 0 {
		return "no limit"
	}
	return bytesText(limit) + "/s"
}
