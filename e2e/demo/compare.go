// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// compare moves the same VM back by QEMU's own post-copy and there again by migrated, and puts the medians into r. The
// two take turns, so that the machine's other load meets both.
func compare(ctx context.Context, o options, l *lab.Lab, vm lab.VMConfig, guest *report.Log, r *demoReport) error {
	ours, theirs := []float64{r.DowntimeMS}, []float64{}
	oursResidency, theirsResidency := []float64{r.ResidencyMS}, []float64{}
	r.QEMU = &qemuReport{}
	for round := 1; ; round++ {
		say("Back by QEMU's own post-copy, round %d of %d", round, o.rounds)
		moved, v, seen, err := back(ctx, l, vm, guest)
		if err != nil {
			return fmt.Errorf("QEMU's own post-copy: %w", err)
		}
		if round == 1 {
			r.QEMU.client = seen
		}
		theirs, theirsResidency = append(theirs, milliseconds(moved.Downtime)),
			append(theirsResidency, milliseconds(moved.Residency))
		r.QEMU.Bytes, r.QEMU.GuestCorruptions = moved.Bytes, v.corruptions
		if round == o.rounds {
			break
		}
		again, err := plain.migrate(ctx, l, fmt.Sprintf("demo-%d", round+1), vm, guest)
		if err != nil {
			return err
		}
		ours, oursResidency = append(ours, again.DowntimeMS), append(oursResidency, again.ResidencyMS)
		r.GuestCorruptions, r.guestErr = again.GuestCorruptions, again.guestErr
	}
	r.DowntimeMS, r.ResidencyMS = median(ours), median(oursResidency)
	r.QEMU.DowntimeMS, r.QEMU.ResidencyMS = median(theirs), median(theirsResidency)
	r.QEMUDowntimeMS = &r.QEMU.DowntimeMS
	r.DowntimesMS, r.QEMU.DowntimesMS = ours, theirs
	return nil
}

// back moves the VM from host b to host a by QEMU's own post-copy, as migrate moves it there.
func back(ctx context.Context, l *lab.Lab, vm lab.VMConfig, guest *report.Log) (
	moved rival.Result, v *verdict, seen client, err error,
) {
	pinger, err := l.Ping(vm, 0, pingEvery)
	if err != nil {
		return moved, nil, seen, err
	}
	moved, err = rival.Migrate(ctx, l.B, l.A, vm, rival.Options{})
	if err == nil {
		v, err = watchGuest(ctx, l.A, guest)
	}
	pings, stopErr := pinger.Stop()
	return moved, v, newClient(pings, moved.Switch), errors.Join(err, stopErr)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}
