// SPDX-License-Identifier: Apache-2.0

package listing

import (
	"testing"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// full returns a list with as many migrations as a daemon remembers, each with some labels and figures.
func full() (h *host, vms []*vm) {
	h = newHost()
	for range 512 {
		v := h.add(1, map[string]string{"team": "db", "evacuation": "host-a-7"})
		v.is.VmName, v.is.Spec.Vm, v.is.Spec.Destination = "postgres", "/run/qemu/db.qmp", "10.0.0.2:7600"
		v.is.UpdateTime, v.is.Progress.Downtime, v.is.Progress.BytesTotal =
			timestamppb.Now(), durationpb.New(2_400_000), 1<<30
		vms = append(vms, v)
	}
	return h, vms
}

// BenchmarkPage lists all migrations.
func BenchmarkPage(b *testing.B) {
	h, _ := full()
	for b.Loop() {
		if page, err := h.Page(Filter{}, 0, ""); err != nil || len(page.GetMigrations()) != 512 {
			b.Fatal(err)
		}
	}
}

// BenchmarkRefresh publishes an update of the figures of a migration.
func BenchmarkRefresh(b *testing.B) {
	h, vms := full()
	for b.Loop() {
		vms[0].moves()
		h.passes(figuresEvery)
		vms[0].entry.Refresh()
	}
}
