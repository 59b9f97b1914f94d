// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"
)

// bare migrates without a policy. Only the flag supervises a userfaultfd then, if the kernel has it.
func bare(ctx context.Context, _ *audit) error {
	s, err := newScene(ctx, none, shared)
	defer s.close()
	if err == nil {
		err = s.bare(ctx)
	}
	if err != nil {
		s.daemonLogs()
	}
	return err
}

func (s *scene) bare(ctx context.Context) error {
	// There and back. The first migration uses --require-secure, because a refusal must leave the VM as it was.
	if _, err := s.to().startIncoming(ctx); err != nil {
		return err
	}
	before, id := s.from().pass(), s.id()
	said, err := s.from().operate(ctx, s.attach(id, "--require-secure")...)
	if err != nil {
		if err := s.refused(ctx, "bare-require", said, "unsupervised", "--require-secure", "deploy/selinux"); err != nil {
			return err
		}
	} else if err := s.moved(ctx, "bare-require", id, before); err != nil {
		return err
	}

	if _, err := s.to().startIncoming(ctx); err != nil {
		return err
	}
	id = s.id()
	done, jumped := whileClockJumps(ctx, func() error { return s.migrate(ctx, "bare", id, s.attach(id)) })
	check("bare-clock", "jumped", jumped)
	return done
}

// refused reports on a migration that had to be refused: the operator was told all of the words, the VM counts on where
// it was, and the QEMU that waited for it has ended.
func (s *scene) refused(ctx context.Context, name, said string, words ...string) error {
	logf("%s: %s", name, said)
	var err error
	for _, word := range words {
		if !strings.Contains(said, word) {
			err = fmt.Errorf("the operator is not told of %q", word)
		}
	}
	check(name, "refused", err)
	check(name+"-guest", "counts", s.from().countsOn(ctx))
	check(name+"-destination", "gone",
		until(ctx, "the destination's QEMU to end", func() bool { return s.to().qemu() == 0 }))
	return nil
}
