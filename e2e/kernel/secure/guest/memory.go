// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// memory is the kind of a VM's RAM.
type memory int

const (
	shared      memory = iota // a file that QEMU maps
	privateToVM               // QEMU's own, in no file: what -m alone makes
)

// args returns the memory's part of QEMU's command line.
func (m memory) args() []string {
	if m == privateToVM {
		return []string{"-machine", "q35"}
	}
	return []string{"-machine", "q35,memory-backend=ram0",
		"-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=%s,share=on", ramMiB, ramPath)}
}

// arrived returns an error unless all of the VM's memory is there. The VM may run meanwhile.
func (h *host) arrived(ctx context.Context, pass uint32) error {
	client, err := qmp.Dial(ctx, h.path(eventsPath)) // the daemon uses the other socket
	if err != nil {
		return err
	}
	defer client.Disconnect() //nolint:errcheck // all was said
	ram, err := h.ram(ctx, client)
	if err != nil {
		return err
	}
	return metal.Arrived(ram, pass)
}

// ram returns the path of a file with the VM's memory: the file that QEMU maps, or a copy of QEMU's present memory.
func (h *host) ram(ctx context.Context, client *qmp.Client) (string, error) {
	if h.memory == shared {
		return h.path(ramPath), nil
	}
	var said string
	if err := client.Do(ctx, "human-monitor-command", map[string]string{"command-line": "gpa2hva 0"}, &said); err != nil {
		return "", err
	}
	// "Host virtual address for 0x0 (pc.ram) is 0x7f...".
	_, text, _ := strings.Cut(strings.TrimSpace(said), ") is 0x")
	var addr int64
	if _, err := fmt.Sscanf(text, "%x", &addr); err != nil {
		return "", fmt.Errorf("QEMU says %q of the guest's first page: %w", said, err)
	}
	pid := h.qemu()
	if err := isPrivate(pid, addr); err != nil {
		return "", err
	}
	from, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return "", err
	}
	defer from.Close()
	path := "/tmp/ram-" + h.name
	to, err := os.Create(path)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(to, io.NewSectionReader(from, addr, ramMiB<<20))
	return path, errors.Join(err, to.Close())
}

// isPrivate returns an error unless the mapping at an address of a process is private and of no file.
func isPrivate(pid int, addr int64) error {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		var start, end int64
		var flags, offset, device string
		var inode uint64
		if _, err := fmt.Sscanf(line, "%x-%x %s %s %s %d", &start, &end, &flags, &offset, &device, &inode); err != nil {
			return fmt.Errorf("maps: %q: %w", line, err)
		}
		if start <= addr && addr < end {
			if flags != "rw-p" || inode != 0 {
				return fmt.Errorf("the VM's memory is no private one: %s", line)
			}
			return nil
		}
	}
	return fmt.Errorf("process %d has nothing at %#x", pid, addr)
}
