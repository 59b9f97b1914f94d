// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestBackends boots the bare-metal guest in each kind of memory and reads what the guest has written there.
func TestBackends(t *testing.T) {
	const mib = 32
	for _, backend := range lab.Backends() {
		for _, c := range []lab.VMConfig{{}, {Nodes: 2}, {HugePages: true}} {
			if c.HugePages && !backend.Huge() {
				continue
			}
			c.Backend, c.VCPUs, c.MemoryMiB = backend, 1, mib
			t.Run(fmt.Sprintf("%s, %d nodes, huge %v", backend, c.Nodes, c.HugePages), func(t *testing.T) {
				ctx := testContext(t)
				if c.HugePages {
					uffdtest.ReserveHugePages(t, 2*mib/2)
				}
				l := stage(t)
				disk, err := image.Metal(ctx, mib)
				if err != nil {
					t.Fatal(err)
				}
				c.Disk = disk
				startVM(t, l.A, c)
				awaitPass(ctx, t, l.A, 2)
				checkRAM(ctx, t, l.A, c)
			})
		}
	}
}

// awaitPass waits until the bare-metal guest on h has reached that pass.
func awaitPass(ctx context.Context, t *testing.T, h *lab.Host, pass uint32) {
	t.Helper()
	serial, err := os.Open(h.Path(lab.SerialLog))
	if err != nil {
		t.Fatal(err)
	}
	defer serial.Close()
	if _, err := report.WaitLine(bufio.NewReader(report.Tail(ctx, serial)), func(line string) bool {
		n, err := metal.Pass(line)
		return err == nil && n >= pass
	}); err != nil {
		t.Fatal(err)
	}
}

// checkRAM stops the bare-metal guest and checks its RAM in a file that QEMU saves, and in QEMU's own files if it has
// them.
func checkRAM(ctx context.Context, t *testing.T, h *lab.Host, c lab.VMConfig) {
	t.Helper()
	client, err := h.QMP(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Disconnect() //nolint:errcheck // nothing is pending
	if err := client.Do(ctx, "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	saved, err := h.SaveRAM(ctx, client, c, lab.SavedRAM)
	if err != nil {
		t.Fatal(err)
	}
	result, err := metal.Verify(saved)
	if err != nil || result.Pass < 2 || result.Pages == 0 {
		t.Errorf("RAM that QEMU saved: %+v, %v", result, err)
	}
	var files []string
	for _, file := range c.RAMFiles() {
		files = append(files, h.Path(file))
	}
	if files == nil {
		return
	}
	if own, err := metal.Verify(files...); err != nil || own != result {
		t.Errorf("RAM in %v: %+v, %v; QEMU saved %+v", files, own, err, result)
	}
}
