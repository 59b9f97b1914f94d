// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// qemuProgram is what QEMU's processes are found by.
const qemuProgram = "qemu-system-x86_64"

// clockTick is the unit of the times in /proc/PID/stat; USER_HZ is 100 on every architecture that Go knows.
const clockTick = 10 * time.Millisecond

// meter measures what a move costs: CPU time of everything but the vCPUs, and bytes on the wire.
type meter struct {
	scene    *scene
	from, to *lab.Host
	cpu      cpu
	bytes    uint64
}

// cpu is CPU time.
type cpu struct{ daemons, qemus time.Duration }

func (s *scene) startMeter(ctx context.Context, from, to *lab.Host) (*meter, error) {
	m := &meter{scene: s, from: from, to: to}
	var err error
	if m.cpu, err = s.cpu(); err != nil {
		return nil, err
	}
	m.bytes, err = s.wire(ctx)
	return m, err
}

// stop fills in what was used since the start.
func (m *meter) stop(ctx context.Context, f *figures) error {
	now, err := m.scene.cpu()
	if err != nil {
		return err
	}
	bytes, err := m.scene.wire(ctx)
	f.Bytes = bytes - m.bytes
	f.CPU = now.daemons + now.qemus - m.cpu.daemons - m.cpu.qemus
	f.CPUDaemons = now.daemons - m.cpu.daemons
	return err
}

// cpu is the CPU time that both daemons and both QEMUs have used, without that of the vCPUs. It includes threads that
// have ended, as QEMU's migration threads do.
func (s *scene) cpu() (total cpu, err error) {
	for _, h := range s.hosts() {
		used, err := cpuTime(fmt.Sprintf("/proc/%d/stat", s.daemons[h].PID))
		if err != nil {
			return cpu{}, err
		}
		total.daemons += used
		qemus, err := h.Processes(qemuProgram)
		if err != nil {
			return cpu{}, err
		}
		for _, pid := range qemus {
			used, err := cpuTime(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return cpu{}, err
			}
			vcpus, err := vcpuTime(pid)
			if err != nil {
				return cpu{}, err
			}
			total.qemus += used - vcpus
		}
	}
	return total, nil
}

// vcpuTime is the CPU time of a QEMU's vCPU threads, which it names "CPU 0/TCG".
func vcpuTime(pid int) (time.Duration, error) {
	comms, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/comm", pid))
	if err != nil {
		return 0, err
	}
	total, found := time.Duration(0), 0
	for _, path := range comms {
		comm, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(comm), "CPU ") {
			continue // another thread, or one that has just ended
		}
		used, err := cpuTime(filepath.Join(filepath.Dir(path), "stat"))
		if err != nil {
			return 0, err
		}
		total += used
		found++
	}
	if found == 0 {
		return 0, fmt.Errorf("QEMU %d has no thread whose name begins with CPU", pid)
	}
	return total, nil
}

// cpuTime reads utime and stime of proc_pid_stat(5).
func cpuTime(path string) (time.Duration, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// Fields are counted from behind the name, which may hold anything.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("%s has %d fields", path, len(fields))
	}
	ticks := uint64(0)
	for _, field := range fields[11:13] {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// wire is how many bytes both hosts have sent each other, by their interfaces' counters.
func (s *scene) wire(ctx context.Context) (uint64, error) {
	total := uint64(0)
	for _, h := range s.hosts() {
		out, err := h.Run(ctx, "ip", "-json", "-stats", "link", "show", "dev", "cable")
		if err != nil {
			return 0, err
		}
		var links []struct {
			Stats struct {
				TX struct {
					Bytes uint64 `json:"bytes"`
				} `json:"tx"`
			} `json:"stats64"`
		}
		if err := json.Unmarshal([]byte(out), &links); err != nil || len(links) != 1 {
			return 0, fmt.Errorf("counters of host %s's interface: %w: %s", h.Name, err, out)
		}
		total += links[0].Stats.TX.Bytes
	}
	return total, nil
}
