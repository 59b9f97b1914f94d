// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	metalguest "github.com/migrated-vm/migrated/e2e/metal"
)

// metalMiB is the RAM of the VMs in crowds.
const metalMiB = metalguest.MinMiB

// newMetal starts a VM with the bare-metal guest and waits until it has counted through its memory once.
func (s *stage) newMetal(
	ctx context.Context, name string, at *lab.Host, memory lab.Backend, hugePages bool,
) (*machine, error) {
	disk, err := image.Metal(ctx, metalMiB)
	if err != nil {
		return nil, err
	}
	c := lab.VMConfig{VCPUs: 1, MemoryMiB: metalMiB, Nodes: 1, Backend: memory, HugePages: hugePages, Disk: disk}
	check := &metalChecker{}
	m, err := s.newMachine(ctx, name, c, at, map[string]string{"disk": disk}, check)
	if err != nil {
		return m, err
	}
	if !await(ctx, time.Minute, func() bool { return check.passes(m, at) > 0 }) {
		return m, fmt.Errorf("VM %s does not count", name)
	}
	return m, nil
}

// metalChecker stops the guest, reads its memory, and compares the memory with the guest's position.
type metalChecker struct {
	pass uint64 // the least pass that the guest had come to before the migration
}

// passes returns how many passes the guest has written on h.
func (c *metalChecker) passes(m *machine, h *lab.Host) int {
	text, err := os.ReadFile(h.Path(m.path(lab.SerialLog)))
	if err != nil {
		return 0
	}
	return strings.Count(string(text), "\n")
}

func (c *metalChecker) begin(_ context.Context, m *machine) error {
	c.pass = max(c.pass, uint64(c.passes(m, m.at)))
	return nil
}

func (c *metalChecker) verify(ctx context.Context, m *machine) (damage, error) {
	if err := m.setRunning(ctx, false); err != nil {
		return damage{}, err
	}
	err := c.look(ctx, m)
	if err := m.setRunning(ctx, true); err != nil {
		return damage{}, err
	}
	if err != nil {
		return damage{pages: 1}, err
	}
	written := c.passes(m, m.at)
	if !await(ctx, time.Minute, func() bool { return c.passes(m, m.at) > written }) {
		return damage{}, fmt.Errorf("VM %s does not count any more", m.name)
	}
	return damage{}, nil
}

func (c *metalChecker) said() (damage, error) { return damage{}, nil } // it only counts

// look reads the memory of the stopped guest.
func (c *metalChecker) look(ctx context.Context, m *machine) error {
	result, err := m.at.VerifyMetal(ctx, m.copies.client(m.at), m.config, m.path)
	if err != nil {
		return err
	}
	before := c.pass
	if c.pass = uint64(result.Pass); c.pass < before {
		return fmt.Errorf("%w: memory is of pass %d, before the migration it was of pass %d",
			metalguest.ErrDamaged, c.pass, before)
	}
	return nil
}

func (c *metalChecker) stall(time.Time) time.Duration { return 0 } // it has no clock

func (c *metalChecker) left(*lab.Host) error { return nil }

func (c *metalChecker) forget(context.Context, *machine) error {
	c.pass = 0
	return nil
}

func (c *metalChecker) close() {}
