// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/devicestate"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// deviceStream is the call that carries the device state.
type deviceStream = grpc.ClientStreamingClient[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]

// moveDevices carries the device state over. When it returns nil, the VM is stopped and the destination has loaded all
// of the state.
//
// No wait in it depends on a lock that a QEMU holds while it waits for this daemon. The source's QEMU stops the VM and
// saves into memory: both end without help. What it has written is sent meanwhile, and the destination's QEMU begins to
// load it. That QEMU may wait for a page, with its lock held, in the middle of loading. The lanes that bring the page
// need neither QEMU.
func (s *Source) moveDevices(ctx context.Context) error {
	stream, cancel, err := s.openDeviceStream(ctx)
	defer cancel()
	if err != nil {
		return err
	}
	saver, err := s.vm.NewSaver(ctx)
	if err != nil {
		return fmt.Errorf("prepare to save the device state: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attachTimeout)
		defer cancel()
		if err := saver.Close(ctx); err != nil {
			s.log.Warn("QEMU keeps a descriptor that the device state was saved to", "error", err)
		}
	}()
	giveUp := !s.cfg.Spec.GetRehearse()
	if !s.wasRunning && giveUp {
		// A paused VM that arrived here by a migration and never ran may have no disks to give up.
		if giveUp, err = s.vm.DisksActive(ctx); err != nil {
			return fmt.Errorf("ask QEMU whether it has the VM's disks: %w", err)
		}
	}
	if err := checkRAMNotShared(s.vm, s.facts.RAMBlocks, "source"); err != nil {
		return err
	}
	jobs := s.vm.QMP.Subscribe("JOB_STATUS_CHANGE")
	defer jobs.Close()
	if err := s.checkUnchanged(ctx); err != nil {
		return err
	}
	if err := s.prepareRecord(); err != nil {
		return err
	}
	testPoint("source-recorded")
	if giveUp { // otherwise QEMU keeps its disks and the lock would have no effect
		s.prepareContLock(ctx)
	}

	limit := freezeLimit(s.cfg.Spec)
	ctx, expire := context.WithTimeoutCause(ctx, limit, withRemedy(
		fmt.Errorf("%w: freeze_limit: the device state did not move within %v", errLimitMissed, limit),
		"migrate it again; if it always takes that long, let the VM stand still for longer (--freeze-limit)"))
	defer expire()
	if err := s.stopVM(ctx); err != nil {
		return causeOf(ctx, fmt.Errorf("stop the VM: %w", err))
	}
	testPoint("source-stopped")
	stop := context.AfterFunc(ctx, cancel) // the stream was opened with a context that has no limit
	defer stop()
	began := time.Now()
	s.gaveUpDisks = giveUp
	sender := newDeviceSender(stream)
	committed := s.commitWhileSaving(ctx)
	state, err := saver.Save(ctx, giveUp, s.whileSaving(sender))
	close(sender.offers)
	if err != nil {
		err = fmt.Errorf("save the device state: %w", err)
	}
	// The job comes first: if one has begun, it may be why the save failed.
	if err := errors.Join(checkNoNewJob(jobs), err, <-committed); err != nil {
		return causeOf(ctx, err)
	}
	s.steps.save = time.Since(began)
	testPoint("source-saved")
	// Ask whether the VM stands still only after the save, because a save also succeeds for a VM that runs. The
	// question runs beside the rest of the work, so that nothing waits for the answer.
	mayRun := sync.OnceValue(func() error { return errors.Join(s.checkMayRun(ctx), s.checkDisksGivenUp(ctx)) })
	var asking sync.WaitGroup
	asking.Go(func() { _ = mayRun() }) // finishDevices takes the answer
	defer asking.Wait()
	sections, err := devicestate.Parse(state)
	if err != nil {
		return withRemedy(err, "use a machine type of QEMU 2.4 or newer; if it is one, report this with the version of QEMU")
	}
	body := devicestate.Body(state)
	if s.earlyState != nil {
		body, err = devicestate.Changes(s.earlyState.sections, sections, s.readPagesChanged)
		s.earlyState.close()
		if err != nil {
			return err
		}
	}
	return s.finishDevices(ctx, sender, body, mayRun)
}

// runsOnceLoaded reports whether the destination runs the VM as soon as it has loaded the rest of the state. It may
// after an early load: then it has loaded nearly everything already, and little is left that could fail.
func (s *Source) runsOnceLoaded() bool { return s.earlyState != nil && !s.cfg.Spec.GetRehearse() }

// commitWhileSaving passes the commit point while QEMU saves, if runsOnceLoaded: the destination is then told to run
// the VM with the last of the device state. The channel delivers the result.
func (s *Source) commitWhileSaving(ctx context.Context) <-chan error {
	committed := make(chan error, 1)
	if !s.runsOnceLoaded() {
		committed <- nil
		return committed
	}
	go func() { committed <- s.commit(ctx) }()
	return committed
}

// whileSaving returns the function that sends what QEMU has saved so far, while it saves. After an early load it is
// nil: the changes are only known when everything is saved.
func (s *Source) whileSaving(sender *deviceSender) func(state []byte) error {
	if s.earlyState != nil {
		return nil
	}
	return func(state []byte) error {
		begun, err := devicestate.Begun(state)
		if err == nil {
			sender.offer(begun)
		}
		return err
	}
}

// openDeviceStream opens the call that carries the device state, while the VM still runs. When it returns, the
// destination's QEMU has read up to the first device's state. The caller calls cancel, also on error.
func (s *Source) openDeviceStream(ctx context.Context) (_ deviceStream, cancel context.CancelFunc, err error) {
	destination := s.cfg.Spec.GetDestination()
	ctx, end := context.WithCancelCause(ctx)
	cancel = func() { end(nil) }
	opening := time.AfterFunc(beginTimeout, func() {
		end(withRemedy(fmt.Errorf("the destination QEMU did not begin to load within %v", beginTimeout),
			"see that the destination's host can be reached, and why its QEMU does not answer"))
	})
	defer opening.Stop()
	failed := func(err error) error { return causeOf(ctx, fromPeer("move the device state", destination, err)) }
	s.sleepEvents = s.vm.QMP.Subscribe("SUSPEND", "WAKEUP")
	if err := s.verifyState(ctx); err != nil {
		return nil, cancel, causeOf(ctx, err)
	}
	if s.wasRunning, err = s.vm.Running(ctx); err != nil {
		return nil, cancel, causeOf(ctx, fmt.Errorf("ask QEMU whether the VM runs: %w", err))
	}
	if s.earlyState != nil && !s.wasRunning {
		return nil, cancel, errPausedSince
	}
	if err := s.keepMemory(ctx); err != nil {
		return nil, cancel, causeOf(ctx, err)
	}
	stream, err := s.peer.LoadDeviceState(ctx)
	if err != nil {
		return nil, cancel, failed(err)
	}
	asked := time.Now()
	first := &migratedv1.LoadDeviceStateRequest{
		Id: s.cfg.ID, Paused: !s.wasRunning, Rehearsal: s.cfg.Spec.GetRehearse(), Changes: s.earlyState != nil,
		TotalLeft: s.untilTotalDeadline(),
	}
	if s.earlyState == nil {
		first.Data = devicestate.Head(s.facts.MachineType)
	}
	if err := stream.Send(first); err != nil {
		_, err = stream.CloseAndRecv()
		return nil, cancel, failed(err)
	}
	// The header says that the destination's QEMU reads. On failure there is a status instead of it.
	if header, err := stream.Header(); err != nil || header == nil {
		_, err = stream.CloseAndRecv()
		return nil, cancel, failed(err)
	}
	if err := warmUp(ctx, stream, time.Since(asked)); err != nil {
		_, err = stream.CloseAndRecv()
		return nil, cancel, failed(err)
	}
	testPoint("source-asked")
	return stream, cancel, nil
}

// stopVM stops the VM, and lets the page server begin to serve.
func (s *Source) stopVM(ctx context.Context) error {
	s.moveTo(stopAsked)
	began := time.Now()
	at, ran, err := s.vm.Stop(ctx)
	if err != nil {
		return err
	}
	if err := s.verifyStopped(ctx, ran); err != nil {
		return err
	}
	s.steps.stop = time.Since(began)
	s.stoppedAt = at
	s.setLocation(migratedv1.Location_LOCATION_NOWHERE)
	close(s.stopped)
	return nil
}

// A deviceSender sends the device state in a goroutine of its own, while QEMU still saves. Sending can block, because
// the destination's QEMU does not read while it waits for a page. The saving side must not block, so it only offers.
type deviceSender struct {
	stream deviceStream
	offers chan []byte   // holds at most one: the newest state
	idle   chan struct{} // closed when offers is closed and everything offered is sent

	// Owned by the sender's goroutine until idle is closed.
	sent      int       // bytes
	began     time.Time // when the first byte was sent
	callEnded bool      // the destination has ended the call; the call's status says why
	err       error
}

func newDeviceSender(stream deviceStream) *deviceSender {
	d := &deviceSender{stream: stream, offers: make(chan []byte, 1), idle: make(chan struct{})}
	go func() {
		defer close(d.idle)
		for body := range d.offers {
			d.send(body)
		}
	}()
	return d
}

// offer queues body, which is the state so far. The sender's goroutine sends the part that it has not sent yet. Only
// one goroutine may call offer.
func (d *deviceSender) offer(body []byte) {
	select {
	case <-d.offers: // body includes what was offered before
	default:
	}
	d.offers <- body
}

// send sends the part of body that was not sent yet.
func (d *deviceSender) send(body []byte) {
	if d.sent == 0 && len(body) > 0 {
		d.began = time.Now()
	}
	for d.sent < len(body) && !d.callEnded && d.err == nil {
		n := min(deviceChunk, len(body)-d.sent)
		switch err := d.stream.Send(&migratedv1.LoadDeviceStateRequest{Data: body[d.sent : d.sent+n]}); {
		case err == nil:
			d.sent += n
		case errors.Is(err, io.EOF):
			d.callEnded = true
		default:
			d.err = fmt.Errorf("send the device state: %w", err)
		}
	}
}

// finishDevices sends the rest of the device state, and waits until the destination has loaded it. mayRun returns why
// the destination must not be told to run the VM; nil: it may be told.
func (s *Source) finishDevices(ctx context.Context, sender *deviceSender, body []byte, mayRun func() error) error {
	saved := time.Now()
	if !s.wasRunning { // the destination takes the disks of a paused VM as soon as it has loaded the end of the state
		if err := mayRun(); err != nil {
			return err
		}
	}
	failed := func(err error) error { return causeOf(firstEnded(ctx, sender.stream.Context()), err) }
	<-sender.idle
	if sender.send(body); sender.err != nil {
		return failed(sender.err)
	}
	s.update(func(m *migratedv1.Migration) { m.Progress.BytesDeviceState = uint64(len(body)) })
	if err := mayRun(); err != nil {
		return err
	}
	if s.runsOnceLoaded() && !sender.callEnded {
		if s.resumeReported() {
			return errContinued
		}
		s.moveTo(runAsked)
		s.runSentAt = time.Now()
		// If Send fails, so does the call, whose error CloseAndRecv returns.
		_ = sender.stream.Send(&migratedv1.LoadDeviceStateRequest{Run: s.runRequest(s.runSentAt)})
		s.setLocation(migratedv1.Location_LOCATION_UNKNOWN)
	}
	answer, err := sender.stream.CloseAndRecv()
	s.loadAnsweredAt = time.Now()
	if err != nil {
		err = fromPeer("move the device state", s.cfg.Spec.GetDestination(), err)
	}
	switch {
	case err == nil:
	case !s.toldToRun():
		return failed(err)
	case status.Code(err) == codes.Aborted:
		return fmt.Errorf("%w: %w", ErrNotRun, err)
	default:
		s.log.Warn("the hand-over is not answered", "error", err)
		return nil // handOver sends Run, which returns the outcome
	}
	s.countSteps(sender, answer, saved)
	s.log.Info("the device state is loaded", "bytes", len(body), "stop", s.steps.stop, "save", s.steps.save,
		"transfer", s.steps.transfer, "load", s.steps.load)
	s.loadAnswer = answer
	return nil
}

// countSteps records how long the steps took from saved, when the state was saved, until the answer.
func (s *Source) countSteps(sender *deviceSender, answer *migratedv1.LoadDeviceStateResponse, saved time.Time) {
	s.steps.load = answer.GetLoadTime().AsDuration()
	if run := answer.GetRun(); run != nil { // half of the network time is the answer's way back, which does not count
		network := max(0, s.loadAnsweredAt.Sub(s.runSentAt)-run.GetServeTime().AsDuration())
		s.steps.transfer = s.runSentAt.Sub(saved) + network/2 + s.steps.load
		return
	}
	compared := answer.GetCompareTime().AsDuration()
	s.steps.transfer = s.loadAnsweredAt.Sub(saved) - compared
	s.steps.network = max(0, s.loadAnsweredAt.Sub(sender.began)-compared-s.steps.load)
}

// steps are the durations of the parts of the downtime, by this host's clock. The destination begins to load while the
// source still saves. transfer is the rest after that; network is the time for the two crossings of the device state.
type steps struct{ stop, save, transfer, load, network, cont time.Duration }
