// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"os"
	"path/filepath"
)

// WatchedEmulator is the path of the QEMU that MakeWatchedEmulator makes.
const WatchedEmulator = "/run/emulator/qemu-system-x86_64"

// emulatorPath is the path of QEMU on the hosts.
const emulatorPath = "/usr/bin/qemu-system-x86_64"

// becomeWatched is a script that starts QEMU with a second QMP socket, events.sock in the directory of the VM's name.
// The QEMU that libvirt starts to query capabilities has no VM name, and gets no second socket.
const becomeWatched = `#!/bin/sh
for arg; do
	case $arg in
	guest=*)
		name=${arg#guest=}
		set -- "$@" -qmp "unix:/run/${name%%,*}/events.sock,server=on,wait=off"
		;;
	esac
done
exec ` + emulatorPath + ` "$@"
`

// MakeWatchedEmulator makes a QEMU on the host that lets a test watch domains. A definition with WatchedEmulator
// differs from others only in that path, and libvirt does not know of the second socket.
func (h *Host) MakeWatchedEmulator() error {
	path := h.Path(WatchedEmulator)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(becomeWatched), 0o755)
}

// DomainEventsPath is the second QMP socket of a domain that StartWatchedDomain started.
const DomainEventsPath = "/run/" + DomainName + "/events.sock"

// StartWatchedDomain is StartDomain with WatchedEmulator. Call MakeWatchedEmulator on both hosts before.
func (h *Host) StartWatchedDomain(ctx context.Context, c VMConfig) error {
	for _, h := range h.lab.Hosts() { // QEMU makes the socket there
		if _, err := h.Run(ctx, "install", "-d", "-o", "libvirt-qemu", filepath.Dir(DomainEventsPath)); err != nil {
			return err
		}
	}
	return h.virshDomain(ctx, "create", c, WatchedEmulator)
}
