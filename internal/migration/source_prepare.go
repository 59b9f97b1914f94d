// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/internal/machine"
	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// prepare does everything that can be done while the VM runs.
func (s *Source) prepare(ctx context.Context) error {
	if err := s.attachAndOpen(ctx); err != nil {
		return err
	}
	s.token = rand.Text()
	if err := s.offerPages(); err != nil {
		return err
	}
	destination := s.cfg.Spec.GetDestination()
	machine, err := s.machine()
	if err != nil {
		return err
	}
	notEarly := s.whyNotEarly()
	limit := timeToPrepare(machine) + earlyTries*earlyTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the destination was not ready within %v", limit))
	defer cancel()
	testPoint("source-offered")
	answer, err := s.peer.PrepareIncoming(ctx, &migratedv1.PrepareIncomingRequest{
		Id:                  s.cfg.ID,
		Protocol:            version.Protocol,
		OldestProtocol:      version.OldestToBegin,
		Token:               s.token,
		PageAddresses:       s.cfg.PageAddresses,
		Machine:             machine,
		DestinationQmp:      s.cfg.Spec.GetDestinationQmp(),
		DestinationTemplate: s.cfg.Spec.GetDestinationTemplate(),
		Spec:                s.cfg.Spec,
		Bandwidth:           s.bandwidthLimit(),
		Early:               notEarly == nil,
		Versions:            s.cfg.Versions,
	})
	if err != nil {
		return causeOf(ctx, fromPeer("prepare", destination, err))
	}
	if s.protocol, err = version.AgreeOnProtocol(
		"destination "+destination, answer.GetProtocol(), answer.GetProtocol(),
	); err != nil {
		return withRemedy(fmt.Errorf("prepare: %w", err), sameVersions)
	}
	s.note(func(r *migratedv1.Report) {
		r.Protocol, r.Destination = s.protocol, versionsOf(answer.GetVersions(), "")
	})
	if len(answer.GetRamBlocks()) != len(s.blocks) {
		return fmt.Errorf("prepare: destination %s has %d RAM blocks instead of %d",
			destination, len(answer.GetRamBlocks()), len(s.blocks))
	}
	s.update(func(m *migratedv1.Migration) {
		m.Supervision, m.UserfaultfdLabel = answer.GetSupervision(), answer.GetUserfaultfdLabel()
		m.DestinationQemu = toldQEMU(answer.GetQemu())
	})
	if err := confirmSupervised(s.cfg.Spec, answer); err != nil {
		return err
	}
	if answer.GetEarly() {
		return s.prepareEarly(ctx)
	}
	if notEarly == nil {
		notEarly = errors.New("the destination's daemon is too old for an early load")
	}
	s.update(func(m *migratedv1.Migration) { m.EarlyLoad = &migratedv1.EarlyLoad{Reason: notEarly.Error()} })
	return nil
}

// offerPages lets the destination fetch pages once the VM stands still, and connects to it.
func (s *Source) offerPages() (err error) {
	stopped := s.stopped // startOver replaces the field
	s.export, err = s.cfg.Pages.Offer(s.cfg.ID, s.token, s.ram, func(ctx context.Context) error {
		return s.awaitStopped(ctx, stopped)
	})
	if err != nil {
		return fmt.Errorf("offer the RAM of the VM: %w", err)
	}
	s.export.SetWeight(s.cfg.Spec.GetWeight())
	return s.connect()
}

// connect makes the connection to the destination's daemon. gRPC dials when the connection is first used.
func (s *Source) connect() (err error) {
	destination := s.cfg.Spec.GetDestination()
	if s.conn, err = s.cfg.Dial(destination, withToken(s.cfg.ID, s.token)); err != nil {
		return withRemedy(fmt.Errorf("destination %s: %w", destination, err), "give the destination as HOST:PORT")
	}
	s.peer = migratedv1.NewPeerServiceClient(s.conn)
	s.lastIncoming.conn.Store(s.conn)
	return nil
}

// attachAndOpen attaches to the VM, claims and checks it, and opens its RAM.
func (s *Source) attachAndOpen(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	var err error
	if s.vm, err = qemu.Attach(ctx, s.cfg.Spec.GetVm()); err != nil {
		return fmt.Errorf("attach to the VM: %w", err)
	}
	if s.claim, err = qemuClaims.claimVM(s.vm, s.cfg.ID); err != nil {
		return err
	}
	stale, err := s.refuseHandedOver(ctx)
	if err != nil {
		return err
	}
	if stale != nil {
		s.log.Warn("removing the record of an earlier migration of this VM, which has gone on here since",
			"record", stale.ID, "destination", stale.Destination)
		if err := s.cfg.Records.Remove(stale.ID); err != nil {
			return err
		}
	}
	if err := checkVM(ctx, s.vm); err != nil {
		return err
	}
	if err := s.refuseUndefine(ctx); err != nil {
		return err
	}
	return s.openVM(ctx)
}

// openVM asks QEMU for everything that a destination has to match, and opens the RAM.
func (s *Source) openVM(ctx context.Context) (err error) {
	if s.facts, err = s.vm.Facts(ctx); err != nil {
		return qemuQueryError("source", err)
	}
	s.note(func(r *migratedv1.Report) { r.Source.Qemu = s.facts.Version.String() })
	if s.description, err = machine.Describe(ctx, s.vm); err != nil {
		return qemuQueryError("source", err)
	}
	if s.wasRunning, err = s.vm.Running(ctx); err != nil {
		return qemuQueryError("source", err)
	}
	if s.devices, err = s.vm.UserDevices(ctx); err != nil {
		return qemuQueryError("source", err)
	}
	s.update(func(m *migratedv1.Migration) {
		m.VmName, m.Location = printable.Line(s.facts.Name), migratedv1.Location_LOCATION_SOURCE
	})
	return s.openRAM(writableBlocks(s.facts.RAMBlocks))
}

// timeToPrepare returns how long a destination may take to prepare. It starts a QEMU, which may be told to touch all of
// its memory first.
func timeToPrepare(machine *migratedv1.SourceMachine) time.Duration {
	limit := prepareTimeout
	for _, b := range machine.GetRamBlocks() {
		if b.GetPopulated() {
			limit += time.Duration(b.GetSize()>>30) * time.Second
		}
	}
	return min(limit, longestPrepare)
}

// CheckTime returns how long a destination may take for the check of a VM: as long as to prepare for it, after a wait
// as long for those that it checks before.
func CheckTime(machine *migratedv1.SourceMachine) time.Duration { return 2 * timeToPrepare(machine) }

// writableBlocks returns the blocks that are moved: all but those that QEMU cannot write to, which are the same at the
// destination.
func writableBlocks(blocks []ram.Block) []ram.Block {
	return slices.DeleteFunc(slices.Clone(blocks), func(b ram.Block) bool { return b.ReadOnly })
}

// openRAM opens the VM's memory. blocks is in the order in which the destination knows it.
func (s *Source) openRAM(blocks []ram.Block) (err error) {
	served := make([]pagesrv.Block, 0, len(blocks))
	s.blocks = nil
	for _, b := range blocks {
		block := pagesrv.Block{
			ID: b.ID, Size: b.Size, PageSize: min(b.PageSize, pagesrv.LargestPage), Path: b.Path, Offset: b.FileOffset,
		}
		if b.Private || b.Path == "" {
			block.PID, block.Addr, block.Shared = s.vm.Pid, b.Addr, !b.Private
		}
		served = append(served, block)
		s.blocks = append(s.blocks, keptBlock{ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize})
	}
	if s.ram, err = pagesrv.OpenRAM(served); err != nil {
		return fmt.Errorf("open the RAM of the VM: %w", err)
	}
	return s.vm.Alive() // if QEMU has ended, its number, and what was opened, may be another process's
}

// refuseHandedOver refuses a QEMU that is only kept for the memory of a VM that was handed over, and a VM that an
// earlier migration stopped and could not continue: it would arrive paused. If the VM runs, its operator has continued
// it: it is the VM again, and stale is its record, which the caller removes.
func (s *Source) refuseHandedOver(ctx context.Context) (stale *Record, err error) {
	rec, handedOver, err := s.cfg.Records.ForVM(s.vm.Pid)
	if err != nil {
		return nil, err
	}
	running, err := s.vm.Running(ctx)
	if err != nil {
		return nil, qemuQueryError("source", err)
	}
	if !handedOver {
		if rec, err = s.cfg.Records.stoppedBy(s.vm.Pid); err != nil {
			return nil, err
		}
	}
	switch {
	case rec.ID == "":
		return nil, s.refuseUnknown(running)
	case running:
		return &rec, nil
	case !handedOver && rec.WasRunning:
		return nil, withRemedy(
			fmt.Errorf("this VM does not run: migration %s stopped it at %s, and could not continue it",
				rec.ID, rec.HandedOver.Format(time.RFC3339)),
			fmt.Sprintf("continue it with QMP 'cont', after blockdev-del of the node %s if it has that; "+
				"then migrate it, or stop it again before", qemu.ContLockNode))
	case !handedOver:
		return &rec, nil // it was paused before, and is
	}
	return nil, rec.notHere()
}

// refuseUnknown refuses a VM that stands still while there is a damaged record, which may say that the VM was handed
// over.
func (s *Source) refuseUnknown(running bool) error {
	damaged, err := s.cfg.Records.Damaged()
	if err != nil || running {
		return err
	}
	for _, why := range damaged {
		return withRemedy(fmt.Errorf("this VM does not run, and may have been handed over to another host: %w", why),
			Remedy(why))
	}
	return nil
}

// awaitStart waits for Start. It fails if the destination gives up or the connection to QEMU ends.
func (s *Source) awaitStart(ctx context.Context) error {
	select {
	case <-s.started:
		return nil
	default:
	}
	// The destination ends the stream with a reason when it gives up.
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait() // it uses s.peer, which renew replaces
	defer cancel(nil)
	watching.Go(func() { cancel(s.watchIdlePeer(ctx)) })
	select {
	case <-s.started:
		return nil
	case <-s.vm.QMP.Done():
		return fmt.Errorf("the connection to QEMU ended while waiting for start: %w", s.vm.QMP.Err())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// watchIdlePeer returns when a prepared destination is no longer prepared. The error says why.
func (s *Source) watchIdlePeer(ctx context.Context) error {
	destination := s.cfg.Spec.GetDestination()
	stream, err := s.peer.WatchIncoming(ctx, &migratedv1.WatchIncomingRequest{Id: s.cfg.ID})
	if err != nil {
		return fromPeer("wait for start", destination, err)
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return fromPeer("wait for start", destination, err)
		}
		if Terminal(answer.GetState()) {
			told := answer.GetError()
			return withTold(fmt.Errorf("wait for start: destination %s gave up: %s", destination, told.GetMessage()),
				told.GetReason(), told.GetRemedy())
		}
		s.update(func(m *migratedv1.Migration) { m.DestinationQemu = toldQEMU(answer.GetQemu()) })
	}
}
