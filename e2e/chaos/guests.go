// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// The Linux guest, in MiB: it stamps stampMiB of its memory, visits all of that, and checks all of it when asked.
const (
	linuxMiB = 224
	stampMiB = 48
)

// reporting is how often the guest reports.
const reporting = 100 * time.Millisecond

// linuxArgs are the guest's.
func linuxArgs() []string {
	return []string{
		fmt.Sprintf("migrated.mem=%d", stampMiB), "migrated.workers=2", "migrated.rate=300", "migrated.write=50",
		fmt.Sprintf("migrated.window=%v", reporting),
	}
}

// realLinux is a VM as most are, with a disk that it writes to and a network card that is answered.
func realLinux(kernel, initrd string, memory lab.Backend) lab.VMConfig {
	args := append(linuxArgs(), "migrated.disk-rate=50", "migrated.net-rate=50")
	c := lab.RealVM(kernel, initrd, linuxMiB, 1, 1, args...)
	c.Backend = memory
	c.Number = numbers[memory]
	return c
}

// numbers tell the VMs of a stage from each other on networks.
var numbers = map[lab.Backend]int{lab.BackendDefault: 0, lab.BackendFile: 1, lab.BackendMemfd: 1}

// bareLinux is a VM without devices, of the kind of memory that QEMU's own post-copy is compared with.
func bareLinux(kernel, initrd string) lab.VMConfig {
	return lab.VMConfig{
		VCPUs: 2, MemoryMiB: linuxMiB, Nodes: 1, Backend: lab.BackendFile,
		Kernel: kernel, Initrd: initrd, KernelArgs: linuxArgs(),
	}
}

// linux is the VM with the Linux guest whose RAM is of that kind. It boots when it is needed first; while another one
// is at work, it is stopped.
func (s *stage) linux(ctx context.Context, memory lab.Backend) (*machine, error) {
	for kind, m := range s.guests {
		if run := kind == memory; m.copies.runs(m.at) != run {
			if err := m.setRunning(ctx, run); err != nil {
				return nil, err
			}
		}
	}
	if m := s.guests[memory]; m != nil {
		return m, nil
	}
	kernel, initrd, err := image.LinuxWithVirtio(ctx)
	if err != nil {
		return nil, err
	}
	c := realLinux(kernel, initrd, memory)
	if s.bare {
		c = bareLinux(kernel, initrd)
	}
	m, err := s.bootLinux(ctx, "linux-"+string(memory), c)
	if m != nil {
		s.guests[memory] = m
	}
	return m, err
}

// bootLinux starts a VM with the Linux guest on host a, and returns when that is at work.
func (s *stage) bootLinux(ctx context.Context, name string, c lab.VMConfig) (*machine, error) {
	j := &linuxJudge{ctx: context.WithoutCancel(ctx), path: moved(name, lab.SerialLog), ears: map[*lab.Host]*ear{}}
	m, err := s.newMachine(ctx, name, c, s.lab.A, map[string]string{"kernel": c.Kernel, "initrd": c.Initrd}, j)
	if err != nil {
		return m, err
	}
	booting, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	_, err = j.ears[s.lab.A].log.WaitReady(booting)
	return m, err
}

// bootTime bounds the boot of a guest.
const bootTime = 2 * time.Minute

// keeps says whether the machine is one that the stage goes on with after a case.
func (s *stage) keeps(m *machine) bool {
	for _, guest := range s.guests {
		if guest == m {
			return true
		}
	}
	return false
}

// retire ends a machine that is of no use any more. The next case that needs one like it boots one.
func (s *stage) retire(ctx context.Context, m *machine) error {
	for kind, guest := range s.guests {
		if guest == m {
			delete(s.guests, kind)
			return m.destroy(ctx)
		}
	}
	return nil // who made it ends it
}
