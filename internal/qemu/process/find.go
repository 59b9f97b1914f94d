// SPDX-License-Identifier: Apache-2.0

package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
)

// Found is a QEMU that runs a VM or waits for one, as seen from its process alone.
type Found struct {
	PID  int
	Name string // from -name; may be empty
	UUID string // from -uuid; zeros if it has none
	// Sockets are the QMP Unix sockets at which it listens. Each path is the same file for this process, too.
	Sockets []string
	// Incoming is true when it was started to wait for a VM from another host.
	Incoming bool
	// Elsewhere is true when both its network and its mount namespace differ from those of this process.
	Elsewhere bool
}

// isProgram reports whether a program of that name runs VMs. qemu-img and qemu-nbd do not.
func isProgram(name string) bool {
	return strings.HasPrefix(name, "qemu-system-") || name == "qemu-kvm" || name == "kvm"
}

// Find returns the QEMUs of this host, or of this process's PID namespace. It leaves out a QEMU that ends meanwhile.
func Find() (found []Found, err error) {
	pids, err := All()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, pid := range pids {
		f, err := lookAt(pid)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ESRCH):
		case err != nil:
			errs = append(errs, fmt.Errorf("process %d: %w", pid, err))
		case f != nil:
			found = append(found, *f)
		}
	}
	return found, errors.Join(errs...)
}

// All returns the PIDs of this process's PID namespace. Unlike filepath.Glob, it fails where /proc cannot be read: no
// process would look as if it did not run.
func All() (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list the processes: %w", err)
	}
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// lookAt describes the QEMU with this PID. It returns nil for a process that runs no VM.
func lookAt(pid int) (*Found, error) {
	if maybe, err := looksLikeQEMU(pid); err != nil || !maybe {
		return nil, err
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return nil, err
	}
	// A program that was replaced while it runs, as every update does, has " (deleted)" after its name.
	if !isProgram(filepath.Base(strings.TrimSuffix(exe, " (deleted)"))) {
		return nil, nil
	}
	args, err := readArgs(pid)
	if err != nil {
		return nil, err
	}
	line, err := cmdline.Parse(args)
	if err != nil || len(args) < 2 {
		return nil, nil //nolint:nilerr // QEMU will report the bad option itself, and end
	}
	f := &Found{PID: pid, Name: line.Name(), UUID: uuidOf(pid), Incoming: line.Incoming()}
	if f.Elsewhere, err = isElsewhere(pid); err != nil {
		return nil, err
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil {
		return nil, err
	}
	for _, path := range line.Monitors(dir) {
		if isFileOf(pid, path, path) {
			f.Sockets = append(f.Sockets, path)
		}
	}
	return f, nil
}

// isElsewhere reports whether both the network and the mount namespace of a process differ from those of this one. One
// of the two is not enough: libvirt gives its QEMUs a mount namespace, and systemd may give a daemon one.
func isElsewhere(pid int) (bool, error) {
	for _, kind := range []string{"net", "mnt"} {
		ours, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			return false, err
		}
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			return false, err
		}
		if ours == theirs {
			return false, nil
		}
	}
	return true, nil
}
