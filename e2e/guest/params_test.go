// SPDX-License-Identifier: Apache-2.0

//go:build linux && amd64

package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/guest/card"
	"github.com/migrated-vm/migrated/e2e/guest/disk"
	"github.com/migrated-vm/migrated/e2e/guest/load"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

func TestParseParams(t *testing.T) {
	got, err := parseParams("console=ttyS0 quiet migrated.mem=700 migrated.ws=64 migrated.workers=3 migrated.rate=1000 " +
		"migrated.write=10 migrated.pattern=stride migrated.fill=zero-mix migrated.window=50ms " +
		"migrated.disks=2 migrated.disk-rate=90 migrated.nets=3 migrated.net-rate=80\n")
	if err != nil {
		t.Fatal(err)
	}
	want := params{
		Config: load.Config{Memory: 700 << 20, WorkingSet: 64 << 20, Workers: 3, Rate: 1000,
			WritePercent: 10, Pattern: load.Stride, Fill: stamp.ZeroMix},
		Disks:  disk.Config{Disks: 2, Rate: 90},
		Cards:  card.Config{Cards: 3, Rate: 80},
		Window: 50 * time.Millisecond,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if p, err := parseParams(""); err != nil || p.WorkingSet != p.Memory {
		t.Errorf("defaults: %+v, %v", p, err)
	}
	for _, bad := range []string{"migrated.mem=lots", "migrated.fill=x", "migrated.pattern=x", "migrated.window=0s",
		"migrated.write=200", "migrated.disks=-1", "migrated.nets=99", "migrated.speed=1"} {
		if _, err := parseParams(bad); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}
