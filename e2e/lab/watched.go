// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"os"
	"path/filepath"
)

// WatchedEmulator is QEMU on a host that has MakeWatchedEmulator.
const WatchedEmulator = "/run/emulator/qemu-system-x86_64"

// emulatorPath is QEMU on the hosts.
const emulatorPath = "/usr/bin/qemu-system-x86_64"

// becomeWatched adds a second QMP socket, events.sock in the directory of the VM's name, to the QEMU of a domain. The
// one that libvirt asks for what it can do has no name, and gets none.
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

// MakeWatchedEmulator gives the host a QEMU by which a test can watch domains: a definition that names WatchedEmulator
// has nothing else that others have not, and libvirt does not know of the second socket.
func (h *Host) MakeWatchedEmulator() error {
	path := h.Path(WatchedEmulator)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(becomeWatched), 0o755)
}

// DomainEventsPath is the second QMP socket of a domain that StartWatchedDomain has started.
const DomainEventsPath = "/run/" + DomainName + "/events.sock"

// StartWatchedDomain is StartDomain, of hosts that both have MakeWatchedEmulator.
func (h *Host) StartWatchedDomain(ctx context.Context, c VMConfig) error {
	for _, h := range []*Host{h.lab.A, h.lab.B} { // QEMU makes the socket there
		if _, err := h.Run(ctx, "install", "-d", "-o", "libvirt-qemu", filepath.Dir(DomainEventsPath)); err != nil {
			return err
		}
	}
	return h.virshDomain(ctx, "create", c, WatchedEmulator)
}
