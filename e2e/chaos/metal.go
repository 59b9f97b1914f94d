// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	metalguest "github.com/migrated-vm/migrated/e2e/metal"
)

// metalMiB is the RAM of the VMs that crowds are made of.
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
	j := &metalJudge{}
	m, err := s.newMachine(ctx, name, c, at, map[string]string{"disk": disk}, j)
	if err != nil {
		return m, err
	}
	if !await(ctx, time.Minute, func() bool { return j.passes(m, at) > 0 }) {
		return m, fmt.Errorf("VM %s does not count", name)
	}
	return m, nil
}

// metalJudge stops the guest, reads its memory, and compares that with where the guest is.
type metalJudge struct {
	pass uint64 // that the guest had come to before the migration, at least
}

// passes is how many passes the guest has written on h.
func (j *metalJudge) passes(m *machine, h *lab.Host) int {
	text, err := os.ReadFile(h.Path(m.path(lab.SerialLog)))
	if err != nil {
		return 0
	}
	return strings.Count(string(text), "\n")
}

func (j *metalJudge) begin(_ context.Context, m *machine) error {
	j.pass = max(j.pass, uint64(j.passes(m, m.at)))
	return nil
}

func (j *metalJudge) verify(ctx context.Context, m *machine) (damage, error) {
	if err := m.setRunning(ctx, false); err != nil {
		return damage{}, err
	}
	err := j.look(ctx, m)
	if err := m.setRunning(ctx, true); err != nil {
		return damage{}, err
	}
	if err != nil {
		return damage{pages: 1}, err
	}
	written := j.passes(m, m.at)
	if !await(ctx, time.Minute, func() bool { return j.passes(m, m.at) > written }) {
		return damage{}, fmt.Errorf("VM %s does not count any more", m.name)
	}
	return damage{}, nil
}

func (j *metalJudge) said() (damage, error) { return damage{}, nil } // it only counts

// look reads the memory of the stopped guest: in its files, or as QEMU saves it.
func (j *metalJudge) look(ctx context.Context, m *machine) error {
	var files []string
	for _, file := range m.config.RAMFiles() {
		files = append(files, m.at.Path(m.path(file)))
	}
	if files == nil {
		saved, err := m.at.SaveRAM(ctx, m.copies.client(m.at), m.config, m.path(lab.SavedRAM))
		if err != nil {
			return err
		}
		defer func() { _ = os.Remove(saved) }() // the next one is written anew
		files = []string{saved}
	}
	result, err := metalguest.Verify(files...)
	if err != nil {
		return err
	}
	var text string
	if err := m.copies.client(m.at).Do(ctx, "human-monitor-command", map[string]string{"command-line": "info registers"}, &text); err != nil {
		return err
	}
	registers, err := metalguest.ParseRegisters(text)
	if err != nil {
		return err
	}
	end, err := metalguest.End(metalMiB)
	if err != nil {
		return err
	}
	before := j.pass
	j.pass = uint64(result.Pass)
	if j.pass < before {
		return errors.Join(result.Meets(registers, end), fmt.Errorf("%w: memory is of pass %d, before the migration it was of pass %d", metalguest.ErrDamaged, j.pass, before))
	}
	return result.Meets(registers, end)
}

func (j *metalJudge) stall(time.Time) time.Duration { return 0 } // it has no clock

func (j *metalJudge) left(*lab.Host) error { return nil }

func (j *metalJudge) forget(context.Context, *machine) error {
	j.pass = 0
	return nil
}

func (j *metalJudge) close() {}
