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
)

// qemuProgram is the name by which QEMU's processes are found.
const qemuProgram = "qemu-system-x86_64"

// clockTick is the unit of the times in /proc/PID/stat; USER_HZ is 100 on every architecture that Go knows.
const clockTick = 10 * time.Millisecond

// meter measures what a move costs: CPU time of everything but the vCPUs, and bytes on the wire.
type meter struct {
	scene *scene
	began time.Time
	cpu   cpu
	bytes uint64
}

// cpu is CPU time. bench is mostly the work of the emulated link. used is the time of the whole machine that was used,
// and all is the time that there was.
type cpu struct{ daemons, qemus, vcpus, bench, used, all time.Duration }

func (s *scene) startMeter(ctx context.Context) (*meter, error) {
	m := &meter{scene: s, began: time.Now()}
	var err error
	if m.cpu, err = s.cpu(); err != nil {
		return nil, err
	}
	m.bytes, err = s.wire(ctx)
	return m, err
}

// stop fills in what was used since startMeter.
func (m *meter) stop(ctx context.Context, f *figures) error {
	now, err := m.scene.cpu()
	if err != nil {
		return err
	}
	bytes, err := m.scene.wire(ctx)
	f.Bytes = bytes - m.bytes
	f.CPU = now.daemons + now.qemus - m.cpu.daemons - m.cpu.qemus
	f.CPUDaemons = now.daemons - m.cpu.daemons
	f.Took = time.Since(m.began)
	f.Machine = usedBetween(m.cpu, now)
	return err
}

// cpu returns the CPU time that all daemons and both QEMUs have used, the latter without that of the vCPUs. It includes
// threads that have ended, as QEMU's migration threads do.
func (s *scene) cpu() (total cpu, err error) {
	if total.used, total.all, err = machineTime("/proc/stat"); err != nil {
		return cpu{}, err
	}
	if total.bench, err = cpuTime("/proc/self/stat"); err != nil {
		return cpu{}, err
	}
	for _, h := range s.lab.Hosts() {
		for _, d := range s.daemons[h] {
			used, err := cpuTime(fmt.Sprintf("/proc/%d/stat", d.PID))
			if err != nil {
				return cpu{}, err
			}
			total.daemons += used
		}
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
			total.vcpus += vcpus
		}
	}
	return total, nil
}

// vcpuTime returns the CPU time of a QEMU's vCPU threads, which it names "CPU 0/TCG".
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

// machineTime reads from proc_stat(5) the CPU time that was used, and all CPU time that there was.
func machineTime(path string) (used, all time.Duration, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line)
	const idle, ioWait, last = 4, 5, 8 // guests come after it, and are also counted as users
	if len(fields) <= last || fields[0] != "cpu" {
		return 0, 0, fmt.Errorf("%s begins with %q", path, line)
	}
	for i, field := range fields[1 : last+1] {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("%s: %w", path, err)
		}
		took := time.Duration(n) * clockTick
		all += took
		if i+1 != idle && i+1 != ioWait {
			used += took
		}
	}
	return used, all, nil
}

// cpuTime reads utime and stime of proc_pid_stat(5).
func cpuTime(path string) (time.Duration, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// Fields are counted from the end of the name, which may hold anything.
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

// wire returns how many bytes both hosts have sent each other, by their interfaces' counters.
func (s *scene) wire(ctx context.Context) (uint64, error) {
	total := uint64(0)
	for _, h := range s.lab.Hosts() {
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
