// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// compare moves the same VM between two fresh hosts by QEMU's own post-copy.
func compare(ctx context.Context, vm lab.VMConfig) (_ *qemuReport, err error) {
	say("Now the same VM by QEMU's own post-copy")
	l, err := lab.New(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	var guest report.Log
	here, err := boot(ctx, l.A, vm, &guest)
	if err != nil {
		return nil, err
	}
	if err := here.Close(); err != nil {
		return nil, err
	}
	moved, err := rival.Migrate(ctx, l, l.A, l.B, vm, rival.Options{})
	if err != nil {
		return nil, err
	}
	v, err := watchGuest(ctx, l.B, &guest)
	if err != nil {
		return nil, err
	}
	return &qemuReport{
		DowntimeMS: milliseconds(moved.Downtime), ResidencyMS: milliseconds(moved.Residency),
		Bytes: moved.Bytes, GuestCorruptions: v.corruptions,
	}, v.err
}
