// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	securityfs = "/sys/kernel/security"
	policyDir  = "/etc/apparmor.d"
	// localRules is the file of a host's own rules that the profile of each domain includes.
	localRules = policyDir + "/local/abstractions/libvirt-qemu"
	shipped    = "/deploy/libvirt-qemu" // deploy/apparmor, which goes there
)

// watching are the rules that a QEMU needs because the driver watches it: for the sockets, and for what Go's runtime
// reads.
const watching = `
owner /run/vm/{qmp,events}.sock rw,
/sys/kernel/mm/transparent_hugepage/hpage_pmd_size r,
owner @{PROC}/@{pid}/cgroup r,
`

// profiles are the profiles that Debian's libvirt loads.
var profiles = []string{policyDir + "/usr.sbin.libvirtd", policyDir + "/usr.lib.libvirt.virt-aa-helper"}

// confinedByAppArmor moves a domain of libvirt's there and back. Its QEMU has a profile, as libvirt makes one for each
// domain, beside Debian's profiles of libvirtd and its helper. Host a has nothing of deploy/apparmor, host b has it.
func confinedByAppArmor(ctx context.Context, log *audit) error {
	if err := unix.Mount("securityfs", securityfs, "securityfs", 0, ""); err != nil {
		return err
	}
	mark := log.mark()
	s, err := newDomainScene(ctx, apparmor)
	defer s.close()
	if err == nil {
		check("apparmor-source", "enforced", s.from().hasProfile())
		err = s.moveConfined(ctx, log, "apparmor")
	}
	if err == nil {
		err = s.moveConfined(ctx, log, "apparmor-back")
	}
	s.explain(err, log, mark)
	return err
}

// moveConfined moves the domain, and reports what was refused meanwhile: nothing ("clean"), or a refusal that does no
// harm ("mknod"). A QEMU that saves its devices to /proc/self/fd/N causes the latter: it first asks to make a file
// there, and when that is refused, it opens the existing file all the same.
func (s *scene) moveConfined(ctx context.Context, log *audit, name string) error {
	source, mark := s.from(), log.mark()
	if err := s.moveDomain(ctx, name); err != nil {
		return err
	}
	check(name+"-profile", "enforced", s.from().hasProfile())
	denials, err := s.from().denials(ctx, log, mark)
	if err != nil {
		return err
	}
	got := "clean"
	for _, line := range denials {
		logf("%s: refused: %s", name, line)
		if strings.Contains(line, `operation="mknod" namespace="root//`+source.name+`" profile="libvirt-`) &&
			strings.Contains(line, "/fd/") {
			got = "mknod"
		} else {
			err = errors.New("more was refused than that")
		}
	}
	check(name+"-log", got, err)
	return nil
}

// denials returns the lines about AppArmor's refusals since a mark.
func (h *host) denials(ctx context.Context, log *audit, mark int) ([]string, error) {
	// The kernel logs in the order of the refusals, so that all have come once this one has.
	const last = securityfs + "/apparmor/.replace"
	if _, err := h.try(ctx, libvirtDomain, "open", last); err != nil {
		return nil, err
	}
	isLast := func(line string) bool { return strings.Contains(line, last) }
	err := until(ctx, "the kernel's log", func() bool { return slices.ContainsFunc(log.since(mark), isLast) })
	return slices.DeleteFunc(log.since(mark), isLast), err
}

// ownPolicy gives the host a namespace of AppArmor's, so that each host has a profile of the domain.
func (h *host) ownPolicy(ctx context.Context) error {
	if err := os.Mkdir(securityfs+"/apparmor/policy/namespaces/"+h.name, 0o755); err != nil {
		return err
	}
	err := h.do(func() error { return unix.Mount("tmpfs", policyDir, "tmpfs", 0, "mode=0755") })
	if err != nil {
		return err
	}
	if err := os.CopyFS(h.path(policyDir), os.DirFS(policyDir)); err != nil {
		return err
	}
	if err := os.MkdirAll(h.path(filepath.Dir(localRules)), 0o755); err != nil {
		return err
	}
	rules := []byte(watching)
	if h.name == "b" {
		more, err := os.ReadFile(shipped)
		if err != nil {
			return err
		}
		rules = append(rules, more...)
	}
	if err := os.WriteFile(h.path(localRules), rules, 0o644); err != nil {
		return err
	}
	for _, profile := range profiles { // as Debian's package makes them
		if err := os.WriteFile(h.path(policyDir+"/local/"+filepath.Base(profile)), nil, 0o644); err != nil {
			return err
		}
	}
	p, err := h.start("", 0, nil, append([]string{"/sbin/apparmor_parser", "--replace"}, profiles...)...)
	if err != nil {
		return err
	}
	if said, err := p.wait(ctx); err != nil {
		return fmt.Errorf("load the profiles of host %s: %w: %s", h.name, err, said)
	}
	return nil
}

// profileOn names a profile on this host: libvirtd's for libvirt's domain, and none for all others.
func (h *host) profileOn(domain string) string {
	profile := "unconfined"
	if domain == libvirtDomain {
		profile = "libvirtd"
	}
	return ":" + h.name + ":" + profile
}

// hasProfile returns an error unless the domain's QEMU is confined by the profile that libvirt made for it on this
// host.
func (h *host) hasProfile() error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/apparmor/current", h.qemu()))
	if err != nil {
		return err
	}
	got, want := strings.TrimSpace(string(text)), ":"+h.name+":libvirt-"+domainUUID+" (enforce)"
	if got != want {
		return fmt.Errorf("QEMU is confined by %q, want %q", got, want)
	}
	return nil
}
