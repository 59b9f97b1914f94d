// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// Sizes in bytes of the parts of a split virtqueue (virtio 1.2, 2.7): a descriptor, an entry of each of the other two
// rings, and the fields before and after those entries. The rings of a packed virtqueue are at the same addresses, and
// smaller.
const (
	descriptorBytes = 16
	availableEntry  = 2
	usedEntry       = 8
	ringEnds        = 6
)

// queuesMost is the maximum number of virtqueues to query per device (VIRTIO_QUEUE_MAX in hw/virtio).
const queuesMost = 1024

// virtqueue is QEMU's answer to x-query-virtio-queue-status (VirtQueueStatus in qapi/virtio.json, since QEMU 7.2).
type virtqueue struct {
	Num   uint64 `json:"vring-num"`
	Desc  uint64 `json:"vring-desc"` // guest-physical addresses; 0: the guest has not set the queue up
	Avail uint64 `json:"vring-avail"`
	Used  uint64 `json:"vring-used"`
}

// RingPages returns the pages, of 4 KiB each, that hold the rings of the VM's virtio devices: their addresses in QEMU's
// address space, sorted. QEMU reads these pages when it loads the state of the devices. If the guest's driver restarts,
// the rings move.
func (vm *VM) RingPages(ctx context.Context) ([]uint64, error) {
	var devices []struct {
		Path string `json:"path"`
	}
	if err := vm.QMP.Do(ctx, "x-query-virtio", nil, &devices); err != nil {
		return nil, err
	}
	physical := map[uint64]bool{}
	for _, d := range devices {
		for n := range queuesMost {
			var q virtqueue
			err := vm.QMP.Do(ctx, "x-query-virtio-queue-status", map[string]any{"path": d.Path, "queue": n}, &q)
			if refused := (*qmp.Error)(nil); errors.As(err, &refused) {
				break // the device has no more queues, or is not started
			}
			if err != nil {
				return nil, err
			}
			q.addPages(physical)
		}
	}
	var pages []uint64
	for page := range physical {
		addr, err := vm.RAM.HostAddress(ctx, page)
		if err != nil {
			return nil, fmt.Errorf("where the virtqueue at %#x is: %w", page, err)
		}
		if addr != 0 { // 0: a device behind an IOMMU, whose addresses are not guest-physical
			pages = append(pages, addr)
		}
	}
	slices.Sort(pages)
	return pages, nil
}

// addPages adds the guest-physical addresses of the pages of all three rings.
func (q virtqueue) addPages(to map[uint64]bool) {
	const page = 4096
	if q.Num > 1<<16 {
		return
	}
	for _, ring := range []struct{ at, bytes uint64 }{
		{q.Desc, q.Num * descriptorBytes}, {q.Avail, ringEnds + q.Num*availableEntry}, {q.Used, ringEnds + q.Num*usedEntry},
	} {
		if ring.at == 0 || ring.bytes == 0 {
			continue
		}
		for at := ring.at &^ (page - 1); at < ring.at+ring.bytes; at += page {
			to[at] = true
		}
	}
}
