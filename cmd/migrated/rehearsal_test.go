// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestRehearsalIsShown(t *testing.T) {
	m := &migratedv1.Migration{Id: "dress", Rehearsal: &migratedv1.Rehearsal{
		Downtime: durationpb.New(14 * time.Millisecond), StopTime: durationpb.New(time.Millisecond),
		SaveTime: durationpb.New(3 * time.Millisecond), TransferTime: durationpb.New(5 * time.Millisecond),
		LoadTime: durationpb.New(4 * time.Millisecond), ContinueTime: durationpb.New(2 * time.Millisecond),
		BytesDeviceState: 200 << 10, BytesMemory: 4 << 30,
	}}
	const line = "rehearsed: the VM would stand still for 14.0 ms " +
		"(stop 1.0 ms, save 3.0 ms, load 5.0 ms, continue 2.0 ms), " +
		"200.0 KiB of device state, 4.0 GiB of memory would follow"
	if got := rehearsalSummary(m); got != line {
		t.Errorf("%q, want %q", got, line)
	}
	var out strings.Builder
	if err := printRehearsal(&out, m.GetRehearsal()); err != nil ||
		!strings.Contains(out.String(), "the same, byte for byte") {
		t.Errorf("%s, %v", out.String(), err)
	}
	m.Rehearsal.Differences = []*migratedv1.DeviceDifference{{Device: "mc146818rtc", Bytes: 2}}
	if got := rehearsalSummary(m); got != line+"; the state of 1 device differs when the destination saves it again" {
		t.Errorf("%q", got)
	}
	out.Reset()
	if err := printRehearsal(&out, m.GetRehearsal()); err != nil ||
		!strings.Contains(out.String(), "mc146818rtc, instance 0: 2 bytes") {
		t.Errorf("%s, %v", out.String(), err)
	}
}
