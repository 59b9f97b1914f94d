// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	libvirtDomain = "system_r:virtd_t:s0-s0:c0.c7" // QEMUs get two of its categories
	domainName    = "guest"
	domainUUID    = "00000000-0000-4000-8000-0000000000aa"
	domainDisk    = vmDir + "/disk"
	imageLabel    = "object_r:virt_image_t:s0" // of an image that no domain uses
)

// svirt migrates a domain of libvirt's there and back. libvirt runs its QEMU as it does where SELinux enforces: with
// two categories that libvirt chose, as another user, with seccomp, and with a /dev of its own. Nothing may be refused
// to anything on either host.
func svirt(ctx context.Context, log *audit) error {
	err := enforce()
	check("svirt-policy", "enforcing", err)
	if err != nil {
		return err
	}
	mark := log.mark()
	s, err := newDomainScene(ctx, selinux, "--require-secure")
	defer s.close()
	for _, act := range []func(context.Context) error{
		s.sharedLabel,
		func(ctx context.Context) error { return s.moveDomain(ctx, "svirt") },
		func(ctx context.Context) error { return s.moveDomain(ctx, "svirt-back") },
		func(ctx context.Context) error { return s.undisturbed(ctx, log, "svirt-log", mark) },
	} {
		if err == nil {
			err = act(ctx)
		}
	}
	s.explain(err, log, mark)
	return err
}

// newDomainScene makes hosts with libvirt and starts the domain on the first.
func newDomainScene(ctx context.Context, by module, daemonArgs ...string) (*scene, error) {
	s := &scene{}
	for i, addr := range []string{"127.0.0.4", "127.0.0.5"} {
		var err error
		if s.hosts[i], err = newHost(string(rune('a'+i)), addr, by, privateToVM); err != nil {
			return s, err
		}
		if err := s.hosts[i].startLibvirt(ctx, i); err != nil {
			return s, err
		}
		daemonArgs := append([]string{"--qemu-binaries", watchedQEMU}, daemonArgs...)
		if s.daemons[i], err = s.hosts[i].startDaemon(ctx, daemonArgs...); err != nil {
			return s, err
		}
	}
	path := "/run/domain.xml"
	if err := os.WriteFile(s.from().path(path), []byte(domainXML), 0o600); err != nil {
		return s, err
	}
	if _, err := s.from().virsh(ctx, "create", path); err != nil {
		return s, err
	}
	return s, s.from().countsBeyond(ctx, 1)
}

// watchedQEMU is QEMU with the sockets of qemuArgs, by which the driver watches a VM. It is a copy of this program. A
// definition may name it as its emulator, but cannot give an emulator arguments.
const watchedQEMU = "/usr/bin/kvm" // a path that libvirt's AppArmor profiles allow

// watch becomes QEMU. When libvirt asks a QEMU what it can do, that QEMU has no name, and gets no sockets.
func watch(args []string) error {
	const qemu = "/usr/bin/qemu-system-x86_64"
	args = append([]string{qemu}, args...)
	if slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "guest="+domainName) }) {
		args = append(args, monitorArgs()...)
	}
	return unix.Exec(qemu, args, os.Environ())
}

// domainXML is the VM of qemuArgs as libvirt describes it.
var domainXML = fmt.Sprintf(`
<domain type='kvm'>
  <name>%s</name>
  <uuid>%s</uuid>
  <memory unit='MiB'>%d</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <devices>
    <emulator>%s</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='%s'/>
      <target dev='sda' bus='sata'/>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='%s/serial.log' append='on'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
`, domainName, domainUUID, ramMiB, watchedQEMU, domainDisk, vmDir)

// startLibvirt starts the host's libvirtd, with directories of its own, and waits until it answers.
func (h *host) startLibvirt(ctx context.Context, number int) error {
	h.libvirt = true
	dirs := []struct{ path, label string }{
		{"/etc/libvirt", "object_r:etc_t:s0"},
		{"/var/lib/libvirt", "object_r:virt_var_lib_t:s0"},
		{"/var/cache/libvirt", "object_r:virt_var_lib_t:s0"},
		{"/var/log/libvirt", "object_r:virt_log_t:s0"},
	}
	if h.module == selinux {
		if err := label(h.path(domainDisk), imageLabel); err != nil {
			return err
		}
	}
	for _, d := range dirs {
		err := h.do(func() error {
			if err := os.MkdirAll(d.path, 0o755); err != nil {
				return err
			}
			return unix.Mount("tmpfs", d.path, "tmpfs", 0, "mode=0755")
		})
		if err == nil && h.module == selinux {
			err = label(h.path(d.path), d.label)
		}
		if err != nil {
			return fmt.Errorf("libvirt's %s: %w", d.path, err)
		}
	}
	if h.module == apparmor {
		if err := h.ownPolicy(ctx); err != nil {
			return err
		}
	}
	if err := errors.Join(
		os.WriteFile(h.path("/etc/libvirt/qemu.conf"), fmt.Appendf(nil, `
security_driver = "%[2]s"
stdio_handler = "file"
cgroup_controllers = []
user = "+%[1]d"
group = "+%[1]d"
`, qemuUser, h.module), 0o600),
		os.WriteFile(h.path("/etc/libvirt/libvirtd.conf"), fmt.Appendf(nil, `
host_uuid = "00000000-0000-4000-8000-00000000000%d"
auth_unix_rw = "none"
`, number+1), 0o600),
	); err != nil {
		return err
	}
	p, err := h.start(libvirtDomain, 0, nil, "/usr/sbin/libvirtd")
	if err != nil {
		return err
	}
	err = until(ctx, "libvirtd", func() bool {
		_, err := h.virsh(ctx, "list")
		return err == nil || p.ended()
	})
	if err == nil && p.ended() {
		err = fmt.Errorf("libvirtd ended: %w", p.err)
	}
	if err == nil { // libvirt asks QEMU now, because that takes long here, and not when a VM arrives
		_, err = h.virsh(ctx, "domcapabilities", "--emulatorbin", watchedQEMU)
	}
	if err != nil {
		return fmt.Errorf("host %s: %w: %s", h.name, err, p.said.String())
	}
	return nil
}

// virsh runs a command of virsh's on the host.
func (h *host) virsh(ctx context.Context, args ...string) (string, error) {
	p, err := h.start("", 0, nil, append([]string{"/usr/bin/virsh", "--quiet"}, args...)...)
	if err != nil {
		return "", err
	}
	said, err := p.wait(ctx)
	if err != nil {
		return said, fmt.Errorf("virsh %s: %w: %s", strings.Join(args, " "), err, said)
	}
	return said, nil
}

// sharedLabel gives the other host's image the label that the domain's image has, as if both were on one file system
// that keeps labels. The migration is refused then, and the domain goes on.
func (s *scene) sharedLabel(ctx context.Context) error {
	_, level, _ := strings.Cut(domainOf(s.from().qemu()), "svirt_t:")
	image := s.to().path(domainDisk)
	if err := label(image, "object_r:svirt_image_t:"+level); err != nil {
		return err
	}
	said, err := s.from().operate(ctx, s.domainArgs(s.id())...)
	if err == nil {
		return errors.New("a label that both hosts see did not hinder a migration")
	}
	err = nil
	for _, words := range []string{"share the SELinux label of an image", "the VM was not touched"} {
		if !strings.Contains(said, words) {
			err = fmt.Errorf("it does not say %q: %s", words, said)
		}
	}
	check("svirt-shared-label", "refused", err)
	return errors.Join(label(image, imageLabel), s.from().countsOn(ctx))
}

// domainArgs returns the arguments that move the domain.
func (s *scene) domainArgs(id string) []string {
	return []string{"migrate", "--vm", "libvirt:" + domainName, "--to", s.to().daemonAddr(), "--id", id}
}

// moveDomain moves the domain, makes its vCPU wait for a page meanwhile, and reports the result.
func (s *scene) moveDomain(ctx context.Context, name string) error {
	logf("%s: QEMU runs in %s at the source", name, domainOf(s.from().qemu()))
	id := s.id()
	err := s.starve(ctx, name, id, s.domainArgs(id), func() error {
		logf("%s: QEMU runs in %s at the destination", name, domainOf(s.to().qemu()))
		return nil
	})
	if err != nil {
		return err
	}
	there, err := s.from().virsh(ctx, "domstate", domainName)
	if err == nil && there != "running" {
		err = fmt.Errorf("virsh says %q at the destination", there)
	}
	if err == nil {
		err = until(ctx, "the source's libvirt to forget the domain", func() bool {
			_, err := s.to().virsh(ctx, "domstate", domainName)
			return err != nil
		})
	}
	check(name+"-virsh", "running", err)
	return nil
}
