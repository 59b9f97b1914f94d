// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"time"
)

// DomainName is the VM's name in libvirt, and DomainVM its address for migrated.
const (
	DomainName = "guest"
	DomainVM   = "libvirt:" + DomainName
)

// LibvirtSocket is the socket at which a host's libvirtd listens, and which virsh uses.
const LibvirtSocket = "/run/libvirt/libvirt-sock"

// becomeLibvirtHost makes libvirt's directories on a host, and the user that libvirt's package makes. The names of the
// settings are libvirt's. The host has no systemd and no security module, and no control groups unless OwnCgroups is
// set.
const becomeLibvirtHost = `
for dir in /etc/libvirt /var/lib/libvirt /var/cache/libvirt; do
	mkdir -p "$dir"
	mount -t tmpfs -o mode=0755 tmpfs "$dir"
done
add() {
	grep -q "^$QEMU:" "/etc/$1" && return
	{ cat "/etc/$1"; echo "$QEMU:x:64055:$2"; } >"/run/$1"
	mount --bind "/run/$1" "/etc/$1"
}
QEMU=libvirt-qemu
add passwd 64055::/var/lib/libvirt:/usr/sbin/nologin
add group
cat >/etc/libvirt/qemu.conf <<end
security_driver = "none"
stdio_handler = "file"
user = "$QEMU"
group = "$QEMU"
migration_host = "$2"
$3
end
grep -q cgroup_controllers /etc/libvirt/qemu.conf || echo 'cgroup_controllers = []' >>/etc/libvirt/qemu.conf
cat >/etc/libvirt/libvirtd.conf <<end
host_uuid = "$1"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 1
listen_addr = "$2"
auth_tcp = "none"
end
`

// OwnCgroups is a setting of qemu.conf: libvirt uses the machine's control groups. Those of both hosts' domains are in
// one tree.
const OwnCgroups = "# cgroup_controllers: as libvirt likes"

// Libvirt is the libvirtd of a host.
type Libvirt struct {
	*Process
	host *Host
	log  io.Writer
}

// StartLibvirt starts a host's libvirtd. Its QEMUs run as user libvirt-qemu. settings are further lines of its
// qemu.conf.
func (h *Host) StartLibvirt(ctx context.Context, log io.Writer, settings ...string) (*Libvirt, error) {
	uuid := fmt.Sprintf("00000000-0000-4000-8000-0000000000%02x", h.Name[0])
	if _, err := h.Run(ctx, "sh", "-ec", becomeLibvirtHost, "sh", uuid, h.Addr, strings.Join(settings, "\n")); err != nil {
		return nil, err
	}
	h.lab.onClose(h.killDomains) // domains outlive libvirtd
	l := &Libvirt{host: h, log: log}
	return l, l.Restart(ctx)
}

// Restart starts libvirtd again. The one before must have ended.
func (l *Libvirt) Restart(ctx context.Context) (err error) {
	if l.Process, err = l.host.Start(l.log, "libvirtd", "--listen"); err != nil {
		return err
	}
	for {
		if _, err := l.host.Run(ctx, "virsh", "list"); err == nil {
			return nil
		}
		select {
		case <-l.Exited():
			return fmt.Errorf("libvirtd of host %s ended: %w", l.host.Name, l.err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (h *Host) killDomains() error {
	pids, err := h.Processes("qemu-system-x86_64")
	for _, pid := range pids {
		if killErr := syscall.Kill(pid, syscall.SIGKILL); !errors.Is(killErr, syscall.ESRCH) {
			err = errors.Join(err, killErr)
		}
	}
	return err
}

// LibvirtURI is the address of the host's libvirt, for the libvirt of the other host.
func (h *Host) LibvirtURI() string { return "qemu+tcp://" + h.Addr + "/system" }

// Virsh runs a virsh command and returns what it prints.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	out, err := h.Run(ctx, slices.Concat([]string{"virsh", "--quiet"}, args)...)
	return strings.TrimSpace(out), err
}

// IsNoDomain reports whether a virsh command failed because there is no domain with that name.
func IsNoDomain(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "failed to get domain") ||
		strings.Contains(err.Error(), "Domain not found"))
}
