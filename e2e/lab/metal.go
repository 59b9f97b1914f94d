// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// VerifyMetal checks all memory of a VM with the bare-metal guest, in QEMU's own files or in a file that QEMU saves.
// The caller must have stopped the VM. With one vCPU, it also compares the memory with the guest's position in it.
// rename maps the paths of the lab's only VM to those of this VM; nil keeps them.
func (h *Host) VerifyMetal(
	ctx context.Context, client *qmp.Client, c VMConfig, rename func(path string) string,
) (result metal.Result, err error) {
	if rename == nil {
		rename = func(path string) string { return path }
	}
	var files []string
	for _, file := range c.RAMFiles() {
		files = append(files, h.Path(rename(file)))
	}
	if files == nil {
		saved, err := h.SaveRAM(ctx, client, c, rename(SavedRAM))
		if err != nil {
			return result, err
		}
		defer func() { _ = os.Remove(saved) }() // the next SaveRAM writes it again
		files = []string{saved}
	}
	if result, err = metal.Verify(files...); err != nil {
		return result, fmt.Errorf("memory on host %s: %w", h.Name, err)
	}
	if c.VCPUs > 1 {
		return result, nil
	}
	var registers string
	if err := client.Do(
		ctx, "human-monitor-command", map[string]string{"command-line": "info registers"}, &registers,
	); err != nil {
		return result, err
	}
	at, err := metal.ParseRegisters(registers)
	end, endErr := metal.End(c.MemoryMiB)
	if err := errors.Join(err, endErr); err != nil {
		return result, err
	}
	return result, result.Meets(at, end)
}
