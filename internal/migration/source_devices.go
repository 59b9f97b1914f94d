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

// deviceStream is the call that the state of the devices goes over.
type deviceStream = grpc.ClientStreamingClient[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]

// moveDevices carries the device state over: when it returns nil, the VM is
// stopped and the destination has loaded all of it.
//
// No wait in it can depend on a lock that a QEMU holds while it waits for us.
// The source's QEMU stops, and saves into memory: both end by themselves. What it
// has written is sent meanwhile, and the destination's QEMU begins to load it. It
// may wait for a page in the middle of that, with its lock; the lanes that bring
// the page need neither QEMU.
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
		// A VM whose disks were given up before, and that never ran since, has none to give up.
		if giveUp, err = s.vm.DisksActive(ctx); err != nil {
			return fmt.Errorf("ask QEMU whether it has the VM's disks: %w", err)
		}
	}
	if err := checkAlone(s.vm, s.facts.RAMBlocks, "source"); err != nil {
		return err
	}
	jobs := s.vm.QMP.Subscribe("JOB_STATUS_CHANGE")
	defer jobs.Close()
	if err := s.askAgain(ctx); err != nil {
		return err
	}
	if err := s.writeDown(); err != nil {
		return err
	}
	reached("source-recorded")
	if giveUp { // else QEMU does not take anything back when it continues the VM
		s.prepareContLock(ctx)
	}

	limit := freezeLimit(s.cfg.Spec)
	ctx, expire := context.WithTimeoutCause(ctx, limit, withRemedy(fmt.Errorf("the device state did not move within %v", limit),
		"migrate it again; if it always takes that long, let the VM stand still for longer (--freeze-limit)"))
	defer expire()
	if err := s.stop(ctx); err != nil {
		return causeOf(ctx, fmt.Errorf("stop the VM: %w", err))
	}
	reached("source-stopped")
	stop := context.AfterFunc(ctx, cancel) // the stream was opened before there was a limit
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
	// A job that has begun may be why it was not saved, and comes first.
	if err := errors.Join(newJob(jobs), err, <-committed); err != nil {
		return causeOf(ctx, err)
	}
	s.steps.save = time.Since(began)
	reached("source-saved")
	// Asked after the save, which answers of a VM that runs as well, and meanwhile nothing waits for it.
	stands := make(chan error, 1)
	var asking sync.WaitGroup
	asking.Go(func() { stands <- s.stands(ctx) })
	defer asking.Wait()
	sections, err := devicestate.Parse(state)
	if err != nil {
		return withRemedy(err, "use a machine type of QEMU 2.4 or newer; if it is one, report this with the version of QEMU")
	}
	body := devicestate.Body(state)
	if s.early != nil {
		body, err = devicestate.Changes(s.early.sections, sections, s.readsOther)
		s.early.close()
		if err != nil {
			return err
		}
	}
	return s.finishDevices(ctx, sender, body, stands)
}

// endsInOne says that the destination runs the VM as soon as it has loaded: it has loaded nearly everything already, so
// that little is left that could fail.
func (s *Source) endsInOne() bool { return s.early != nil && !s.cfg.Spec.GetRehearse() }

// commitWhileSaving passes the commit point before the destination is told anything, if that is the way. The channel
// has the outcome.
func (s *Source) commitWhileSaving(ctx context.Context) <-chan error {
	committed := make(chan error, 1)
	if !s.endsInOne() {
		committed <- nil
		return committed
	}
	go func() { committed <- s.commit(ctx) }()
	return committed
}

// whileSaving has what QEMU has saved sent while it saves. Changes are known when all is saved.
func (s *Source) whileSaving(sender *deviceSender) func(state []byte) error {
	if s.early != nil {
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

// openDeviceStream has the destination's QEMU read, up to the first device's state, while the VM still runs.
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
	s.sleeps = s.vm.QMP.Subscribe("SUSPEND", "WAKEUP")
	if err := s.verifyState(ctx); err != nil {
		return nil, cancel, causeOf(ctx, err)
	}
	if s.wasRunning, err = s.vm.Running(ctx); err != nil {
		return nil, cancel, causeOf(ctx, fmt.Errorf("ask QEMU whether the VM runs: %w", err))
	}
	if s.early != nil && !s.wasRunning {
		return nil, cancel, errPausedSince
	}
	stream, err := s.peer.LoadDeviceState(ctx)
	if err != nil {
		return nil, cancel, failed(err)
	}
	asked := time.Now()
	first := &migratedv1.LoadDeviceStateRequest{
		Id: s.cfg.ID, Paused: !s.wasRunning, Rehearsal: s.cfg.Spec.GetRehearse(), Changes: s.early != nil,
	}
	if s.early == nil {
		first.Data = devicestate.Head(s.facts.MachineType)
	}
	if err := stream.Send(first); err != nil {
		_, err = stream.CloseAndRecv()
		return nil, cancel, failed(err)
	}
	// The header says that the destination's QEMU reads; without one there is a
	// status instead.
	if header, err := stream.Header(); err != nil || header == nil {
		_, err = stream.CloseAndRecv()
		return nil, cancel, failed(err)
	}
	if err := warmUp(ctx, stream, time.Since(asked)); err != nil {
		_, err = stream.CloseAndRecv()
		return nil, cancel, failed(err)
	}
	reached("source-asked")
	return stream, cancel, nil
}

// stop stops the VM, and lets the page server begin.
func (s *Source) stop(ctx context.Context) error {
	s.stopTried = true
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

// A deviceSender sends the state of the devices while it grows. Sending waits where the destination's QEMU does not read,
// because it waits for a page, so that whoever saves only offers.
type deviceSender struct {
	stream deviceStream
	offers chan []byte   // at most one, the newest
	idle   chan struct{} // closed when all that was offered is sent, after offers was closed

	// Owned by the sender's goroutine until it is idle.
	sent  int       // bytes
	began time.Time // when the first of them was sent
	over  bool      // the destination has ended the call, and will say why
	err   error
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

// offer has the beginning of the body sent, in so far as it was not. One goroutine offers.
func (d *deviceSender) offer(body []byte) {
	select {
	case <-d.offers: // this one has more
	default:
	}
	d.offers <- body
}

// send sends what body has more than was sent.
func (d *deviceSender) send(body []byte) {
	if d.sent == 0 && len(body) > 0 {
		d.began = time.Now()
	}
	for d.sent < len(body) && !d.over && d.err == nil {
		n := min(deviceChunk, len(body)-d.sent)
		switch err := d.stream.Send(&migratedv1.LoadDeviceStateRequest{Data: body[d.sent : d.sent+n]}); {
		case err == nil:
			d.sent += n
		case errors.Is(err, io.EOF):
			d.over = true
		default:
			d.err = fmt.Errorf("send the device state: %w", err)
		}
	}
}

// finishDevices sends what is left of the devices' state, and waits until the destination has loaded it. stands gets
// the answer of stands, without which the destination is not told to run the VM.
func (s *Source) finishDevices(ctx context.Context, sender *deviceSender, body []byte, stands <-chan error) error {
	saved := time.Now()
	<-sender.idle
	if sender.send(body); sender.err != nil {
		return causeOf(ctx, sender.err)
	}
	s.update(func(m *migratedv1.Migration) { m.Progress.BytesDeviceState = uint64(len(body)) })
	if err := <-stands; err != nil {
		return err
	}
	if s.endsInOne() && !sender.over {
		if s.heardResume() {
			return errContinued
		}
		s.toldToRun, s.told = true, time.Now()
		// An error of it is one of the call, which is asked next.
		_ = sender.stream.Send(&migratedv1.LoadDeviceStateRequest{Run: s.runRequest(s.told)})
		s.setLocation(migratedv1.Location_LOCATION_UNKNOWN)
	}
	answer, err := sender.stream.CloseAndRecv()
	s.answered = time.Now()
	if err != nil {
		err = fromPeer("move the device state", s.cfg.Spec.GetDestination(), err)
	}
	switch {
	case err == nil:
	case !s.toldToRun:
		return causeOf(ctx, err)
	case status.Code(err) == codes.Aborted:
		return fmt.Errorf("%w: %w", ErrNotRun, err)
	default:
		s.log.Warn("the hand-over is not answered", "error", err)
		return nil // Run asks for the outcome
	}
	s.countSteps(sender, answer, saved)
	s.log.Info("the device state is loaded", "bytes", len(body), "stop", s.steps.stop, "save", s.steps.save,
		"transfer", s.steps.transfer, "load", s.steps.load)
	s.loaded = answer
	return nil
}

// countSteps says what the steps took between saved, when the state was saved, and the answer.
func (s *Source) countSteps(sender *deviceSender, answer *migratedv1.LoadDeviceStateResponse, saved time.Time) {
	s.steps.load = answer.GetLoadTime().AsDuration()
	if run := answer.GetRun(); run != nil { // which the way back is no part of
		s.steps.transfer = s.told.Sub(saved) + max(0, s.answered.Sub(s.told)-run.GetServeTime().AsDuration())/2 + s.steps.load
		return
	}
	compared := answer.GetCompareTime().AsDuration()
	s.steps.transfer = s.answered.Sub(saved) - compared
	s.steps.network = max(0, s.answered.Sub(sender.began)-compared-s.steps.load)
}

// steps are what the parts of the downtime took, by this host's clock. The destination begins to load while the source
// still saves; transfer is what comes after that, and network what the two crossings of the devices' state took.
type steps struct{ stop, save, transfer, load, network, cont time.Duration }
