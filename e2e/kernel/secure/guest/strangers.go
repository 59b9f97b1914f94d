// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// strangers tries to create, to receive and to use a VM's descriptor, while the QEMU on the host that the VM moves to
// has one.
func (s *scene) strangers(ctx context.Context, log *audit) error {
	if err := s.undisturbed(ctx, log, "there-log", 0); err != nil {
		return err
	}
	h := s.to()
	fds := descriptors(h.qemu())
	if len(fds) != 1 {
		return fmt.Errorf("QEMU has userfaultfds %v", fds)
	}
	// A stranger that may trace processes and may use descriptors of QEMU.
	mark := log.mark()
	said, err := h.try(ctx, strangerDomain, "take", strconv.Itoa(h.qemu()), strconv.Itoa(fds[0]))
	if err != nil {
		return err
	}
	result("stranger-take", said)
	check("stranger-take-log", "denied",
		log.find(ctx, mark, "{ read }", "stranger_t", "migrated_uffd_t:s0:c1,c2", "anon_inode"))

	// A stranger to which a QEMU that its guest has taken over sends its descriptor.
	mark = log.mark()
	sender, err := h.start(qemuDomain, qemuUser, nil, "/usr/bin/probe-qemu", "send", vmDir+"/probe.sock")
	if err != nil {
		return err
	}
	if said, err = h.try(ctx, strangerDomain, "receive", vmDir+"/probe.sock"); err != nil {
		return err
	}
	result("stranger-receive", said)
	check("stranger-receive-log", "denied",
		log.find(ctx, mark, "{ read }", "stranger_t", "migrated_uffd_t:s0:c1,c2", "anon_inode"))
	if said, err := sender.wait(ctx); err != nil || said != "sent" {
		return fmt.Errorf("the sender says %q: %w", said, err)
	}

	// That QEMU itself, which may create a descriptor and no more.
	mark = log.mark()
	if said, err = h.try(ctx, qemuDomain, "use"); err != nil {
		return err
	}
	for _, line := range strings.Split(said, "\n") {
		name, got, _ := strings.Cut(line, " ")
		result("qemu-"+name, got)
	}
	for _, denied := range []string{"ioctl", "read"} {
		check("qemu-"+denied+"-log", "denied",
			log.find(ctx, mark, "{ "+denied+" }", "svirt_t", "migrated_uffd_t:s0:c1,c2", "anon_inode"))
	}
	return nil
}

// undisturbed reports that nothing was refused after mark. It causes a refusal of its own, so that all earlier ones
// have come to the log.
func (s *scene) undisturbed(ctx context.Context, log *audit, name string, mark int) error {
	end := log.mark()
	said, err := s.to().try(ctx, strangerDomain, "create")
	if err != nil {
		return err
	}
	result(strings.TrimSuffix(name, "-log")+"-stranger-create", said)
	if err := log.find(ctx, end, "{ create }", "stranger_t", "anon_inode"); err != nil {
		return err
	}
	for _, line := range log.since(mark) {
		if strings.Contains(line, "{ create }") && strings.Contains(line, "stranger_t") {
			break
		}
		err = fmt.Errorf("refused: %s", line)
		logf("%s: %v", name, err)
	}
	check(name, "clean", err)
	return nil
}

// try runs a probe of this program in a domain, and returns its output.
func (h *host) try(ctx context.Context, domain string, args ...string) (string, error) {
	program := "/usr/bin/probe"
	if strings.Contains(domain, "svirt_t") {
		program = "/usr/bin/probe-qemu" // a domain can only be entered by its program
	}
	p, err := h.start(domain, 0, nil, append([]string{program}, args...)...)
	if err != nil {
		return "", err
	}
	said, err := p.wait(ctx)
	if err != nil {
		return "", fmt.Errorf("probe %q in %s: %w: %s", args, domain, err, said)
	}
	return said, nil
}
