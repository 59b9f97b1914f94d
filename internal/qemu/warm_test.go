// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
)

// A destination that is prepared loads the device state with fewer page faults in QEMU's own memory.
func TestPreparedDestinationFaultsLess(t *testing.T) {
	warm, cold := math.MaxInt, math.MaxInt
	for range 3 { // the least of them
		warm = min(warm, faultsWhileLoading(t, (*VM).PrepareIncoming))
		cold = min(cold, faultsWhileLoading(t, func(vm *VM, ctx context.Context) error {
			return vm.SetCapabilities(ctx, map[string]bool{capEvents: true, capLateBlock: true})
		}))
	}
	t.Logf("page faults while loading: %d, %d without warmHeap", warm, cold)
	if warm >= cold {
		t.Errorf("%d page faults while loading, %d without warmHeap", warm, cold)
	}
}

func faultsWhileLoading(t *testing.T, prepare func(*VM, context.Context) error) int {
	t.Helper()
	path := ramFile(t)
	_, source := start(t, ram(path)...)
	process, destination := start(t, append(ram(path), "-S", "-incoming", "defer")...)
	ctx := testContext(t)
	if err := prepare(destination, ctx); err != nil {
		t.Fatal(err)
	}
	stream := save(t, source, true)
	// What preparing left to be done has been done when QEMU answers once more.
	if _, err := destination.Running(ctx); err != nil {
		t.Fatal(err)
	}
	before := minorFaults(t, process.Pid())
	if err := load(t, destination, stream); err != nil {
		t.Fatal(err)
	}
	return minorFaults(t, process.Pid()) - before
}

// minorFaults is how many page faults the main thread of a process has had, which is the one that loads:
// minflt of /proc/pid/stat (proc(5)).
func minorFaults(t *testing.T, pid int) (faults int) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // the name before it may hold anything
	var state string
	var ignored int64
	_, err = fmt.Sscan(rest, &state, &ignored, &ignored, &ignored, &ignored, &ignored, &ignored, &faults)
	if err != nil {
		t.Fatalf("%v in %q", err, rest)
	}
	return faults
}
