// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/card"
	"github.com/migrated-vm/migrated/e2e/image"
)

// DomainName is that of the VM where it is libvirt's, and DomainVM its address.
const (
	DomainName = "guest"
	DomainVM   = "libvirt:" + DomainName
)

// becomeLibvirtHost gives a host directories of libvirt's own, and the user that its package makes. The names of its
// settings are libvirt's; there are no systemd, no control groups and no security module on it.
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
namespaces = []
cgroup_controllers = []
user = "$QEMU"
group = "$QEMU"
end
cat >/etc/libvirt/libvirtd.conf <<end
host_uuid = "$1"
auth_unix_rw = "none"
end
`

// A Libvirt is the libvirtd of a host.
type Libvirt struct {
	*Process
	host *Host
	log  io.Writer
}

// StartLibvirt starts a host's libvirtd, whose QEMUs run as libvirt-qemu.
func (h *Host) StartLibvirt(ctx context.Context, log io.Writer) (*Libvirt, error) {
	uuid := fmt.Sprintf("00000000-0000-4000-8000-0000000000%02x", h.Name[0])
	if _, err := h.Run(ctx, "sh", "-ec", becomeLibvirtHost, "sh", uuid); err != nil {
		return nil, err
	}
	h.lab.onClose(h.killDomains) // they outlive it
	l := &Libvirt{host: h, log: log}
	return l, l.Restart(ctx)
}

// Restart starts libvirtd once more. The one before has ended.
func (l *Libvirt) Restart(ctx context.Context) (err error) {
	if l.Process, err = l.host.Start(l.log, "libvirtd"); err != nil {
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

// Virsh runs a command of virsh's and returns what it prints.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	out, err := h.Run(ctx, slices.Concat([]string{"virsh", "--quiet"}, args)...)
	return strings.TrimSpace(out), err
}

// StartDomain has the host's libvirt start the VM, with a Linux guest, as a transient domain.
func (h *Host) StartDomain(ctx context.Context, c VMConfig) error {
	if err := h.lab.install(ctx, c); err != nil {
		return err
	}
	const path = VMDir + "/domain.xml"
	if err := os.WriteFile(h.Path(path), []byte(c.domain()), 0o644); err != nil {
		return err
	}
	_, err := h.Virsh(ctx, "create", path)
	return err
}

// domain is the definition of the VM as a user of libvirt would write it.
func (c VMConfig) domain() string {
	var devices strings.Builder
	for i := range c.Disks {
		fmt.Fprintf(&devices, `<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>`+
			`<source file='%s/guest-disk%d.qcow2'/><target dev='vd%c' bus='virtio'/><serial>disk%d</serial></disk>`,
			SharedDir, i, 'a'+i, i)
	}
	for i := range c.NICs {
		fmt.Fprintf(&devices, `<interface type='ethernet'><mac address='%v'/><target dev='%s' managed='no'/><model type='virtio'/></interface>`,
			card.MAC(c.Number, i), c.tap(i))
	}
	var line strings.Builder
	_ = xml.EscapeText(&line, []byte(strings.Join(slices.Concat([]string{image.CommandLine}, c.deviceParams(), c.KernelArgs), " "))) // to memory
	return fmt.Sprintf(`<domain type='qemu'>
<name>%s</name>
<memory unit='MiB'>%d</memory>
<vcpu>%d</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>%s</kernel><initrd>%s</initrd><cmdline>%s</cmdline></os>
<features><acpi/><apic/></features>
<cpu mode='custom' match='exact'><model>qemu64</model></cpu>
<devices>
<emulator>/usr/bin/qemu-system-x86_64</emulator>
<serial type='file'><source path='%s' append='on'/></serial>
<serial type='unix'><source mode='bind' path='%s'/><target port='1'/></serial>
<video><model type='vga'/></video>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
%s
</devices>
</domain>
`, DomainName, c.MemoryMiB, c.VCPUs, kernelPath, initrdPath, line.String(), ConsoleLog, SerialPath, devices.String())
}
