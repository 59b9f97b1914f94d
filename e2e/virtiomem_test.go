// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestVirtioMemShrinksAndGrows moves a guest that has most of its memory from a virtio-mem device. While its pages
// arrive, the device takes memory from the guest and gives it back.
func TestVirtioMemShrinksAndGrows(t *testing.T) {
	t.Parallel()
	whole := func(h *lab.Host) { awaitPlugged(t, h, func(mib uint64) bool { return mib == 384 }) }
	g := newShrinkingGuest(t, lab.VMConfig{MemoryMiB: 320, Extra: []string{
		"-m", "320M,maxmem=1G", "-object", "memory-backend-file,id=mem1,size=512M,mem-path=/dev/shm/mem1,share=on",
		"-device", "virtio-mem-pci,id=vmem0,memdev=mem1,requested-size=384M",
	}}, "1M", whole, "memhp_default_state=online_movable", "migrated.churn=96")
	resize(t, g.lab.B, 128)
	awaitPlugged(t, g.lab.B, func(mib uint64) bool { return mib < 384 })
	resize(t, g.lab.B, 512)
	awaitPlugged(t, g.lab.B, func(mib uint64) bool { return mib == 512 })
	g.finish(2)
}

const vmem = "/machine/peripheral/vmem0"

// resize requests that the guest use mib MiB of the device.
func resize(t *testing.T, h *lab.Host, mib uint64) {
	t.Helper()
	ask(t, h, "qom-set", map[string]any{"path": vmem, "property": "requested-size", "value": mib << 20}, nil)
}

// awaitPlugged waits until ok accepts how many MiB of the device the guest has.
func awaitPlugged(t *testing.T, h *lab.Host, ok func(mib uint64) bool) {
	t.Helper()
	eventually(t, func() error {
		var size uint64
		if ask(t, h, "qom-get", map[string]any{"path": vmem, "property": "size"}, &size); !ok(size >> 20) {
			return fmt.Errorf("the guest has %d MiB of the device", size>>20)
		}
		return nil
	})
}
