// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// qemuAbstraction is what the profile of each of libvirt's QEMUs includes of a host's own.
const qemuAbstraction = "/etc/apparmor.d/local/abstractions/libvirt-qemu"

// watching is what a QEMU needs that the driver watches.
const watching = `
/usr/bin/watched/qemu-system-x86_64 rmix,
owner /run/vm/*.sock rw,
`

// confinedByAppArmor migrates a domain of libvirt's whose QEMU has a profile of its own, as libvirt makes one for each
// domain, with Debian's profiles for libvirtd and its helper. It is moved once: both hosts have one kernel, in which the
// source's libvirt removes the profile when its domain ends, also from the QEMU at the destination.
func confinedByAppArmor(ctx context.Context, log *audit) error {
	err := loadProfiles()
	check("apparmor-profiles", "loaded", err)
	if err != nil {
		return err
	}
	s, err := newDomainScene(ctx, apparmor)
	defer s.close()
	mark := log.mark()
	if err == nil {
		logf("QEMU is confined by %s", profileOf(s.from().qemu()))
		if !strings.HasPrefix(profileOf(s.from().qemu()), "libvirt-") || !strings.HasSuffix(profileOf(s.from().qemu()), "(enforce)") {
			err = fmt.Errorf("QEMU is confined by %q", profileOf(s.from().qemu()))
		}
		check("apparmor-qemu", "confined", err)
	}
	if err == nil {
		err = s.moveDomain(ctx, "apparmor")
	}
	if err == nil {
		var denied error
		for _, line := range log.since(mark) {
			denied = fmt.Errorf("refused: %s", line)
			logf("%v", denied)
		}
		check("apparmor-log", "clean", denied)
	}
	s.explain(err, log, 0)
	return err
}

// loadProfiles has the kernel confine what starts libvirtd from now on.
func loadProfiles() error {
	if err := unix.Mount("securityfs", "/sys/kernel/security", "securityfs", 0, ""); err != nil {
		return err
	}
	f, err := os.OpenFile(qemuAbstraction, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(watching); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	for _, profile := range []string{"usr.sbin.libvirtd", "usr.lib.libvirt.virt-aa-helper"} {
		said, err := exec.Command("/sbin/apparmor_parser", "--replace", "/etc/apparmor.d/"+profile).CombinedOutput()
		if err != nil {
			return fmt.Errorf("load %s: %w: %s", profile, err, said)
		}
	}
	return nil
}

// profileOf is the profile of a process and its mode.
func profileOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/apparmor/current", pid))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

// ownProfiles gives the host's libvirt a directory for the profiles that it makes.
func (h *host) ownProfiles() error {
	const dir, template = "/etc/apparmor.d/libvirt", "TEMPLATE.qemu"
	text, err := os.ReadFile(dir + "/" + template)
	if err != nil {
		return err
	}
	if err := h.do(func() error { return unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755") }); err != nil {
		return err
	}
	return os.WriteFile(h.path(dir+"/"+template), text, 0o644)
}
