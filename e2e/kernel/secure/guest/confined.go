// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// confined migrates under the policy: there; back, while others try to get at the descriptor; not at all, while the
// policy forbids it; and there again.
func confined(ctx context.Context, log *audit) error {
	err := enforce()
	check("policy", "enforcing", err)
	if err != nil {
		return err
	}
	s, err := newScene(ctx, selinux, shared, "--require-secure")
	defer s.close()
	for _, act := range []func(context.Context, *audit) error{s.there, s.back, s.forbidden, s.again} {
		if err == nil {
			err = act(ctx, log)
		}
	}
	s.explain(err, log, 0)
	return err
}

// there is the main case: a migration under the policy, with --require-secure.
func (s *scene) there(ctx context.Context, _ *audit) error {
	if _, err := s.to().startIncoming(ctx); err != nil {
		return err
	}
	check("domains", "confined", s.domains())
	id := s.id()
	err := s.starve(ctx, "there", id, s.attach(id, "--require-secure"), func() error { return nil })
	if err == nil {
		s.operates(ctx, "there")
	}
	return err
}

// operates checks what a confined daemon needs besides a migration: to look for the VMs of its host among processes
// that it may not look into, and to write an evacuation down.
func (s *scene) operates(ctx context.Context, name string) {
	h := s.from()
	said, err := h.operate(ctx, "vms")
	if err == nil && !strings.Contains(said, fmt.Sprint(h.qemu())) {
		err = fmt.Errorf("QEMU, process %d, is not among them:\n%s", h.qemu(), said)
	}
	check(name+"-vms", "listed", err)
	// There is no such VM: nothing is moved, and that is written down.
	if said, err = h.operate(ctx, "evacuate", "--plan", "--to", s.to().daemonAddr(), "--vm", "nobody"); err == nil {
		err = fmt.Errorf("a VM that does not exist can be moved:\n%s", said)
	} else {
		var kept []string
		kept, err = filepath.Glob(h.path(daemonDir + "/evacuations/*"))
		if err == nil && len(kept) == 0 {
			err = fmt.Errorf("nothing is written down: %s", said)
		}
	}
	check(name+"-evacuation", "written", err)
}

// starve migrates, and stops the source's daemon right after the switch, so that no page comes: the vCPU must fault on
// a missing page and wait. Then it calls meanwhile and lets the daemon go on.
func (s *scene) starve(ctx context.Context, name, id string, args []string, meanwhile func() error) error {
	before, daemon := s.from().pass(), s.daemons[s.vm].cmd.Process
	if _, err := s.from().operate(ctx, append(args, "--detach")...); err != nil {
		return err
	}
	ctx, failed := context.WithCancelCause(ctx)
	defer failed(nil)
	watched := make(chan error, 1)
	go func() {
		_, err := s.from().operate(ctx, "watch", id)
		if err != nil { // waiting for anything else is useless then
			failed(err)
		}
		watched <- err
	}()
	if err := s.to().resumed(ctx); err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	if err := daemon.Signal(unix.SIGSTOP); err != nil {
		return err
	}
	check(name+"-vcpu", "waits", vcpuWaits(ctx, s.to().qemu()))
	if err := errors.Join(meanwhile(), daemon.Signal(unix.SIGCONT)); err != nil {
		return err
	}
	if err := <-watched; err != nil {
		return err
	}
	return s.moved(ctx, name, id, before)
}

// domains checks that the daemons and the QEMUs run in the domains that the policy is about.
func (s *scene) domains() error {
	var errs []error
	for i, h := range s.hosts {
		daemon, qemu := domainOf(s.daemons[i].pid()), domainOf(h.qemu())
		logf("host %s: the daemon runs in %s, QEMU in %s", h.name, daemon, qemu)
		if daemon != daemonDomain || qemu != qemuDomain {
			errs = append(errs, fmt.Errorf("host %s: want %s and %s", h.name, daemonDomain, qemuDomain))
		}
	}
	return errors.Join(errs...)
}

// back prepares first. From then on the destination's QEMU has a descriptor, and strangers try to get it. If the kernel
// accepts 2 for the sysctl, QEMU makes its descriptor without privilege and without the device.
func (s *scene) back(ctx context.Context, log *audit) error {
	const sysctl = "/proc/sys/vm/unprivileged_userfaultfd"
	result("sysctl-2", outcome(os.WriteFile(sysctl, []byte("2"), 0)))
	if _, err := s.to().startIncoming(ctx); err != nil {
		return err
	}
	id := s.id()
	if _, err := s.from().operate(ctx, s.attach(id, "--prepare-only")...); err != nil {
		return err
	}
	way := "none"
	for _, method := range []string{"userfaultfd=userfaultfd(2)", "userfaultfd=/dev/userfaultfd"} {
		if strings.Contains(s.daemons[1-s.vm].said.String(), method) {
			_, way, _ = strings.Cut(method, "=")
		}
	}
	result("sysctl-2-way", way)
	if err := s.strangers(ctx, log); err != nil {
		return err
	}
	if err := s.migrate(ctx, "back", id, []string{"migrate", "--id", id}); err != nil {
		return err
	}
	return os.WriteFile(sysctl, []byte("0"), 0)
}

// forbidden tries to migrate under policies that forbid a part of it.
func (s *scene) forbidden(ctx context.Context, log *audit) error {
	for _, c := range []struct {
		policy string
		denied []string // in the kernel's log
		told   []string // to the operator
	}{
		{"no-create", []string{"{ create }", "svirt_t", "anon_inode"},
			[]string{"security module", "(" + fullContext(qemuDomain) + ") may not create", "deploy/selinux"}},
		{"no-receive", []string{"{ read }", "migrated_t", "anon_inode"},
			[]string{"security module", "(" + fullContext(daemonDomain) + ") may not receive", "deploy/selinux"}},
	} {
		if err := loadPolicy(c.policy); err != nil {
			return err
		}
		if _, err := s.to().startIncoming(ctx); err != nil {
			return err
		}
		mark := log.mark()
		said, err := s.from().operate(ctx, s.attach(s.id())...)
		if err == nil {
			return fmt.Errorf("policy %s did not hinder a migration", c.policy)
		}
		if err := s.refused(ctx, c.policy, said, c.told...); err != nil {
			return err
		}
		check(c.policy+"-log", "denied", log.find(ctx, mark, c.denied...))
	}
	return loadPolicy("base")
}

// again migrates once more, into a QEMU that the daemon starts: what was forbidden has not harmed the VM. The daemon is
// killed while the vCPU waits, and the next one takes the descriptor from QEMU again.
func (s *scene) again(ctx context.Context, log *audit) error {
	// The new QEMU has no categories. With categories, whoever starts it labels files for it.
	if err := errors.Join(s.to().clear(), label(s.to().path(vmDir+"/disk"), "object_r:svirt_image_t:s0")); err != nil {
		return err
	}
	mark, id, arrival := log.mark(), s.id(), 1-s.vm
	args := []string{"migrate", "--vm", qmpPath, "--to", s.to().daemonAddr(), "--id", id}
	err := s.starve(ctx, "again", id, args, func() (err error) {
		s.daemons[arrival].kill()
		s.daemons[arrival], err = s.hosts[arrival].startDaemon(ctx, "--require-secure")
		return err
	})
	if err != nil {
		return err
	}
	const says = "taking up a migration that an earlier run of this daemon left"
	if !strings.Contains(s.daemons[arrival].said.String(), says) {
		err = fmt.Errorf("the second daemon does not say %q", says)
	}
	check("again-successor", "took-up", err)
	logf("again: QEMU, which the daemon started, runs in %s", domainOf(s.from().qemu()))
	return s.undisturbed(ctx, log, "again-log", mark)
}
