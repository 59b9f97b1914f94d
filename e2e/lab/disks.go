// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// diskMiB is the size of each disk as its guest sees it.
const diskMiB = 64

// DiskFiles are the paths, on all hosts, of the images of the VM's writable disks.
func (c VMConfig) DiskFiles() []string {
	var files []string
	for i := range c.Disks {
		files = append(files, fmt.Sprintf("%s/guest-disk%d.qcow2", SharedDir, i))
	}
	return files
}

// diskArgs are the VM's writable disks: no cache of the host's stands between two hosts and their storage.
func (c VMConfig) diskArgs(s *slots) {
	for i, file := range c.DiskFiles() {
		s.args = append(s.args, "-blockdev", fmt.Sprintf(
			"driver=qcow2,node-name=disk%d,cache.direct=on,file.driver=file,file.cache.direct=on,file.filename=%s", i, file))
		s.device(fmt.Sprintf("virtio-blk-pci,id=disk%[1]d,drive=disk%[1]d,serial=disk%[1]d", i))
	}
}

// UEFI firmware, of Debian's package ovmf: what every VM reads, and the template of what each writes.
const (
	firmwareCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	firmwareVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
	varsPath     = SharedDir + "/guest-vars.fd"
)

// ErrNoFirmware says that this machine has no UEFI firmware for VMs.
var ErrNoFirmware = errors.New("no UEFI firmware on this machine: apt-get install ovmf")

func (c VMConfig) firmwareArgs() []string {
	if !c.UEFI {
		return nil
	}
	return []string{
		"-blockdev", "driver=raw,node-name=code,read-only=on,file.driver=file,file.filename=" + firmwareCode,
		"-blockdev", "driver=raw,node-name=vars,file.driver=file,file.filename=" + varsPath,
		"-machine", "pflash0=code,pflash1=vars",
	}
}

// MakeStorage makes what the VM has in SharedDir, the images of its disks and what its firmware writes, as far as it
// is not there: a disk keeps what its guest has written. rename says where a path of the lab's only VM is; nil:
// there.
func (l *Lab) MakeStorage(ctx context.Context, c VMConfig, rename func(path string) string) error {
	if rename == nil {
		rename = func(path string) string { return path }
	}
	for _, file := range c.DiskFiles() {
		if err := l.makeShared(rename(file), func(path string) error {
			size := fmt.Sprintf("%dM", diskMiB)
			create := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, size)
			if out, err := create.CombinedOutput(); err != nil {
				return fmt.Errorf("qemu-img (package qemu-utils): %w: %s", err, out)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	if !c.UEFI {
		return nil
	}
	return l.makeShared(rename(varsPath), func(path string) error {
		vars, err := os.ReadFile(firmwareVars)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrNoFirmware, err)
		}
		return os.WriteFile(path, vars, 0o600)
	})
}

// makeShared has a file of SharedDir made unless it is there. It is an unprivileged VM's, too.
func (l *Lab) makeShared(path string, produce func(path string) error) error {
	path = l.Shared(path)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := produce(path); err != nil {
		return err
	}
	return errors.Join(os.Chmod(path, 0o666), os.Chown(path, nobody, nobody))
}

// Shared is where a path in SharedDir is found from outside of the hosts.
func (l *Lab) Shared(path string) string {
	return filepath.Join(l.storage, "shared", strings.TrimPrefix(path, SharedDir))
}
