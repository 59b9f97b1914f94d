// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
)

// private migrates a VM whose memory is QEMU's own there and back, under the policy. The source's daemon reads the
// memory in /proc/PID/mem; the destination's makes QEMU drop what QEMU put into its memory when it started. On the way
// back the daemon starts the QEMU.
func private(ctx context.Context, log *audit) error {
	mark := log.mark()
	s, err := newScene(ctx, selinux, privateToVM, "--require-secure")
	defer s.close()
	for _, act := range []func(context.Context) error{
		s.privateThere, s.privateBack,
		func(ctx context.Context) error { return s.undisturbed(ctx, log, "private-log", mark) },
	} {
		if err == nil {
			err = act(ctx)
		}
	}
	s.explain(err, log, mark)
	return err
}

func (s *scene) privateThere(ctx context.Context) error {
	if _, err := s.to().startIncoming(ctx); err != nil {
		return err
	}
	id := s.id()
	return s.starve(ctx, "private", id, s.attach(id), func() error { return nil })
}

func (s *scene) privateBack(ctx context.Context) error {
	if err := errors.Join(s.to().clear(), label(s.to().path(vmDir+"/disk"), "object_r:svirt_image_t:s0")); err != nil {
		return err
	}
	id := s.id()
	args := []string{"migrate", "--vm", qmpPath, "--to", s.to().daemonAddr(), "--id", id}
	return s.starve(ctx, "private-back", id, args, func() error { return nil })
}
