// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
)

// A scene is two hosts with their daemons, and the VM.
type scene struct {
	hosts   [2]*host
	daemons [2]*process
	vm      int // index of the host where it runs
	runs    int // migrations so far
}

// newScene makes the hosts and starts the VM on the first.
func newScene(ctx context.Context, by module, memory memory, daemonArgs ...string) (*scene, error) {
	s := &scene{}
	for i, addr := range []string{"127.0.0.2", "127.0.0.3"} {
		var err error
		if s.hosts[i], err = newHost(string(rune('a'+i)), addr, by, memory); err != nil {
			return s, err
		}
		if s.daemons[i], err = s.hosts[i].startDaemon(ctx, daemonArgs...); err != nil {
			return s, err
		}
	}
	if _, err := s.from().startQEMU(ctx); err != nil {
		return s, err
	}
	return s, s.from().countsBeyond(ctx, 1)
}

// from returns the host where the VM runs, to the other host.
func (s *scene) from() *host { return s.hosts[s.vm] }
func (s *scene) to() *host   { return s.hosts[1-s.vm] }

func (s *scene) close() {
	for _, h := range s.hosts {
		if h != nil {
			h.close()
		}
	}
}

// daemonLogs logs the output of the daemons, for finding out why something failed.
func (s *scene) daemonLogs() {
	for i, d := range s.daemons {
		if d != nil {
			logf("daemon of host %s: %s", s.hosts[i].name, d.said.String())
		}
	}
}

// explain logs the daemons' output and the refusals since mark if err is not nil.
func (s *scene) explain(err error, log *audit, mark int) {
	if err == nil {
		return
	}
	s.daemonLogs()
	for _, line := range log.since(mark) {
		logf("%s", line)
	}
}

// id names the next migration.
func (s *scene) id() string {
	s.runs++
	return fmt.Sprintf("move-%d", s.runs)
}

// attach returns the arguments of a migration into a QEMU that was started for it.
func (s *scene) attach(id string, extra ...string) []string {
	return append([]string{
		"migrate", "--vm", qmpPath, "--to", s.to().daemonAddr(), "--to-qmp", qmpPath, "--id", id,
	}, extra...)
}

// moved checks a VM after its migration and reports what arrived, how its descriptor was supervised, what its memory
// holds, and that it counts on.
func (s *scene) moved(ctx context.Context, name, id string, before uint32) error {
	// This comes first, and checks the memory alone. What the vCPU does with it later is a separate question, see
	// README.md.
	check(name+"-arrived", "whole", s.to().arrived(ctx, before))
	source, err := s.from().status(ctx, id)
	if err != nil {
		return err
	}
	destination, err := s.to().status(ctx, id)
	if err != nil {
		return err
	}
	s.vm = 1 - s.vm
	logf("%s: %s; %s %q at the source, %s %q at the destination; %s faults, %s pages, downtime %s, residency %s",
		name, source.State, source.Supervision, source.Label, destination.Supervision, destination.Label,
		source.Progress.Faults, source.Progress.PagesTotal, source.Progress.Downtime, source.Progress.Residency)
	if source.State != "MIGRATION_STATE_COMPLETED" || source.Progress.Faults == "" {
		return fmt.Errorf("migration %s is not as it should be", id)
	}
	if destination.Supervision != source.Supervision || destination.Label != source.Label {
		return fmt.Errorf("the two ends of migration %s do not agree", id)
	}
	result(name, source.Supervision)
	h := s.from()
	if source.Label != "" {
		result(name+"-label", h.shown(source.Label))
	}
	err = h.countsBeyond(ctx, before)
	check(name+"-guest", "counts", err)
	memory, err := h.verify(ctx)
	if err == nil && memory.Pass <= before {
		err = fmt.Errorf("the memory is of pass %d; the guest had written %d at the source", memory.Pass, before)
	}
	logf("%s: %d pages hold pass %d up to %#x, and the one before from there",
		name, memory.Pages, memory.Pass, memory.Position)
	if err == nil {
		err = h.countsOn(ctx)
	}
	check(name+"-memory", "verified", err)
	return err // nothing more can be learned from a guest that went astray
}

// migrate migrates by an operator's command and reports on it.
func (s *scene) migrate(ctx context.Context, name, id string, args []string) error {
	before := s.from().pass()
	if _, err := s.from().operate(ctx, args...); err != nil {
		return err
	}
	return s.moved(ctx, name, id, before)
}
