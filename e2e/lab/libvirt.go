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

// DomainName is that of the VM where it is libvirt's, and DomainVM its address.
const (
	DomainName = "guest"
	DomainVM   = "libvirt:" + DomainName
)

// becomeLibvirtHost gives a host directories of libvirt's own, and the user that its package makes. The names of its
// settings are libvirt's; there are no systemd and no security module on it, and no control groups unless asked for.
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

// OwnCgroups, as a setting of qemu.conf, has libvirt use the control groups that the machine has. Those of both hosts'
// domains are in one tree.
const OwnCgroups = "# cgroup_controllers: as libvirt likes"

// A Libvirt is the libvirtd of a host.
type Libvirt struct {
	*Process
	host *Host
	log  io.Writer
}

// StartLibvirt starts a host's libvirtd, whose QEMUs run as libvirt-qemu. settings are further ones of its qemu.conf.
func (h *Host) StartLibvirt(ctx context.Context, log io.Writer, settings ...string) (*Libvirt, error) {
	uuid := fmt.Sprintf("00000000-0000-4000-8000-0000000000%02x", h.Name[0])
	if _, err := h.Run(ctx, "sh", "-ec", becomeLibvirtHost, "sh", uuid, h.Addr, strings.Join(settings, "\n")); err != nil {
		return nil, err
	}
	h.lab.onClose(h.killDomains) // they outlive it
	l := &Libvirt{host: h, log: log}
	return l, l.Restart(ctx)
}

// Restart starts libvirtd once more. The one before has ended.
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

// LibvirtURI is the address of the host's libvirt for the other host's.
func (h *Host) LibvirtURI() string { return "qemu+tcp://" + h.Addr + "/system" }

// Virsh runs a command of virsh's and returns what it prints.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	out, err := h.Run(ctx, slices.Concat([]string{"virsh", "--quiet"}, args)...)
	return strings.TrimSpace(out), err
}

// IsNoDomain says whether a command of virsh's failed because there is no domain of that name.
func IsNoDomain(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "failed to get domain") ||
		strings.Contains(err.Error(), "Domain not found"))
}
