// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/cannot"
)

// hugePages makes sure of n free huge pages of 2 MiB for this test.
func hugePages(t *testing.T, n int) {
	t.Helper()
	const knob = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(knob)
	if err != nil {
		cannot.Run(t, "no huge pages on this machine: %v", err)
	}
	if err := os.WriteFile(knob, []byte(strconv.Itoa(n)), 0o644); err != nil {
		cannot.Run(t, "huge pages cannot be reserved: %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(knob, before, 0o644); err != nil {
			t.Errorf("give the huge pages back: %v", err)
		}
	})
	text, err := os.ReadFile(knob)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || got < n {
		cannot.Run(t, "only %d of %d huge pages can be reserved (%v)", got, n, err)
	}
}

// TestBackends boots the bare-metal guest in each kind of memory and reads what it has written there.
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
					hugePages(t, 2*mib/2)
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

// awaitPass waits until the bare-metal guest on h has counted so far.
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

// checkRAM stops the bare-metal guest and reads its RAM as QEMU saves it, and in QEMU's own files where it has them.
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
