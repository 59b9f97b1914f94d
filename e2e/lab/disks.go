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

// diskMiB is the size of each disk that the guest sees, in MiB.
const diskMiB = 64

// DiskFiles returns the paths of the images of the VM's writable disks. They are the same on all hosts.
func (c VMConfig) DiskFiles() []string {
	var files []string
	for i := range c.Disks {
		files = append(files, fmt.Sprintf("%s/guest-disk%d.qcow2", SharedDir, i))
	}
	return files
}

// diskArgs adds the VM's writable disks. They bypass the host's page cache, because two hosts share the storage.
func (c VMConfig) diskArgs(s *slots) {
	for i, file := range c.DiskFiles() {
		s.args = append(s.args, "-blockdev", fmt.Sprintf(
			"driver=qcow2,node-name=disk%d,cache.direct=on,file.driver=file,file.cache.direct=on,file.filename=%s", i, file))
		s.device(fmt.Sprintf("virtio-blk-pci,id=disk%[1]d,drive=disk%[1]d,serial=disk%[1]d", i))
	}
}

// UEFI firmware of Debian's package ovmf: the code that all VMs read, and the template of the variables that each VM
// writes.
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

// MakeStorage makes the VM's files in SharedDir: the images of its disks and its firmware's variables. It keeps a file
// that exists, and so what the guest has written. rename maps the paths of the lab's only VM to those of this VM; nil
// keeps them.
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

// makeShared calls produce to make a file in SharedDir, unless it exists. An unprivileged VM can use the file.
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

// Shared returns the path, outside of the hosts, of a path in SharedDir.
func (l *Lab) Shared(path string) string {
	return filepath.Join(l.storage, "shared", strings.TrimPrefix(path, SharedDir))
}
