// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestCPUTime(t *testing.T) {
	if _, err := cpuTime("/proc/self/stat"); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "stat")
	line := "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 25 8 9 20 0 1 0 5\n"
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	if d, err := cpuTime(path); err != nil || d != 1750*time.Millisecond {
		t.Errorf("%v, %v; want 1.75s", d, err)
	}
	if _, err := vcpuTime(os.Getpid()); err == nil {
		t.Error("a process that is no QEMU has vCPUs")
	}
}

func TestMachineTime(t *testing.T) {
	if used, all, err := machineTime("/proc/stat"); err != nil || used <= 0 || all <= used {
		t.Errorf("%v of %v, %v", used, all, err)
	}
	path := filepath.Join(t.TempDir(), "stat")
	// user nice system idle iowait irq softirq steal guest guest_nice
	if err := os.WriteFile(path, []byte("cpu  10 20 30 400 50 6 7 8 9 9\ncpu0 1 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if used, all, err := machineTime(path); err != nil || used != 81*clockTick || all != 531*clockTick {
		t.Errorf("%v of %v, %v", used, all, err)
	}
	if err := os.WriteFile(path, []byte("intr 1 2 3 4 5 6 7 8 9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := machineTime(path); err == nil {
		t.Error("a file without CPUs has CPU time")
	}
}

func TestUsedBetween(t *testing.T) {
	from := cpu{daemons: 1, qemus: 2, vcpus: 3, bench: 4, used: 100, all: 1000}
	to := cpu{daemons: 11, qemus: 22, vcpus: 103, bench: 54, used: 400, all: 1400}
	want := machineUse{Busy: 0.75, Emulation: 0.375, Others: 0.3} // 300, 150 and 120 of 400
	if got := usedBetween(from, to); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := usedBetween(from, from); got != (machineUse{}) {
		t.Errorf("no time: %+v", got)
	}
}
