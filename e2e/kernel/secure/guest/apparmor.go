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
	// localRules is what the profile of each domain includes of a host's own.
	localRules = policyDir + "/local/abstractions/libvirt-qemu"
	shipped    = "/deploy/libvirt-qemu" // deploy/apparmor, which is for it
)

// watching is what a QEMU needs that the driver watches: the sockets, and what Go's runtime reads.
const watching = `
owner /run/vm/{qmp,events}.sock rw,
/sys/kernel/mm/transparent_hugepage/hpage_pmd_size r,
owner @{PROC}/@{pid}/cgroup r,
`

// profiles are those that Debian's libvirt loads.
var profiles = []string{policyDir + "/usr.sbin.libvirtd", policyDir + "/usr.lib.libvirt.virt-aa-helper"}

// confinedByAppArmor moves a domain of libvirt's there and back whose QEMU has a profile, as libvirt makes one for each
// domain, with Debian's profiles of libvirtd and its helper. Host a has nothing of deploy/apparmor, host b has it.
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

// moveConfined moves the domain, and reports what was refused meanwhile: nothing ("clean"), or the one thing that hinders
// nothing ("mknod"). A QEMU that saves its devices to /proc/self/fd/N would make a file there, and opens the one that is
// there all the same.
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

// denials are the lines about what AppArmor has refused since a mark.
func (h *host) denials(ctx context.Context, log *audit, mark int) ([]string, error) {
	// The kernel logs in the order of what happened: once this is there, all is.
	const last = securityfs + "/apparmor/.replace"
	if _, err := h.try(ctx, libvirtDomain, "open", last); err != nil {
		return nil, err
	}
	isLast := func(line string) bool { return strings.Contains(line, last) }
	err := until(ctx, "the kernel's log", func() bool { return slices.ContainsFunc(log.since(mark), isLast) })
	return slices.DeleteFunc(log.since(mark), isLast), err
}

// ownPolicy gives the host a policy of its own: a namespace of AppArmor's, so that each has a profile of the domain.
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
	for _, profile := range profiles { // as the package makes them
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

// profileOn names a profile of the host's: that of libvirtd's for it, and none for everybody else.
func (h *host) profileOn(domain string) string {
	profile := "unconfined"
	if domain == libvirtDomain {
		profile = "libvirtd"
	}
	return ":" + h.name + ":" + profile
}

// hasProfile says whether the domain's QEMU is confined by the profile that libvirt made for it on this host.
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
