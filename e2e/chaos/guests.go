// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// The Linux guest's memory, in MiB: the guest stamps stampMiB of it, visits all of these, and checks all of them when
// asked.
const (
	linuxMiB = 224
	stampMiB = 48
)

// reporting is how often the guest reports.
const reporting = 100 * time.Millisecond

// linuxArgs returns the guest's arguments.
func linuxArgs() []string {
	return []string{
		fmt.Sprintf("migrated.mem=%d", stampMiB), "migrated.workers=2", "migrated.rate=300", "migrated.write=50",
		fmt.Sprintf("migrated.window=%v", reporting),
	}
}

// realLinux returns a VM like most VMs, with a disk that it writes to and a network card that is answered.
func realLinux(kernel, initrd string, memory lab.Backend) lab.VMConfig {
	args := append(linuxArgs(), "migrated.disk-rate=50", "migrated.net-rate=50")
	c := lab.RealVM(kernel, initrd, linuxMiB, 1, 1, args...)
	c.Backend = memory
	c.Number = numbers[memory]
	return c
}

// numbers distinguish the VMs of a stage on networks.
var numbers = map[lab.Backend]int{lab.BackendDefault: 0, lab.BackendFile: 1, lab.BackendMemfd: 1}

// bareLinux returns a VM without devices, with the kind of memory that is compared with QEMU's own post-copy.
func bareLinux(kernel, initrd string) lab.VMConfig {
	return lab.VMConfig{
		VCPUs: 2, MemoryMiB: linuxMiB, Nodes: 1, Backend: lab.BackendFile,
		Kernel: kernel, Initrd: initrd, KernelArgs: linuxArgs(),
	}
}

// linux returns the VM with the Linux guest whose RAM is of that kind. The VM boots when it is first needed, and is
// stopped while another one is at work.
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

// bootLinux starts a VM with the Linux guest on host a, and returns when the guest is at work. TCG of QEMU 7.2 loses
// some guests with several vCPUs at their boot (lab.Host.Boot), so a VM whose guest says nothing is booted once more.
func (s *stage) bootLinux(ctx context.Context, name string, c lab.VMConfig) (*machine, error) {
	m, err := s.tryLinux(ctx, name, c)
	if m == nil || !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		return m, err
	}
	if gone := m.destroy(ctx); gone != nil {
		return nil, errors.Join(err, gone)
	}
	return s.tryLinux(ctx, name, c)
}

func (s *stage) tryLinux(ctx context.Context, name string, c lab.VMConfig) (*machine, error) {
	check := &linuxChecker{
		ctx: context.WithoutCancel(ctx), path: moved(name, lab.SerialLog), listeners: map[*lab.Host]*listener{},
	}
	m, err := s.newMachine(ctx, name, c, s.lab.A, map[string]string{"kernel": c.Kernel, "initrd": c.Initrd}, check)
	if err != nil {
		return m, err
	}
	booting, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	_, err = check.listeners[s.lab.A].log.WaitReady(booting)
	return m, err
}

// bootTime bounds the boot of a guest.
const bootTime = 2 * time.Minute

// keeps reports whether the stage goes on with the machine after a case.
func (s *stage) keeps(m *machine) bool {
	for _, guest := range s.guests {
		if guest == m {
			return true
		}
	}
	return false
}

// retire ends a machine that is of no further use. The next case that needs a machine like it boots one.
func (s *stage) retire(ctx context.Context, m *machine) error {
	for kind, guest := range s.guests {
		if guest == m {
			delete(s.guests, kind)
			return m.destroy(ctx)
		}
	}
	return nil // its maker ends it
}
