// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/internal/devicestate"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// deviceStream is the call that the state of the devices goes over.
type deviceStream = grpc.ClientStreamingClient[migratedv1.LoadDeviceStateRequest, migratedv1.LoadDeviceStateResponse]

// moveDevices carries the device state over: when it returns nil, the VM is
// stopped and the destination has loaded all of it.
//
// No wait in it can depend on a lock that a QEMU holds while it waits for us.
// The source's QEMU stops, and saves into memory: both end by themselves. Not
// before that is the first byte sent, so that its monitor, which the page server
// may ask, is free while the destination loads. The destination's QEMU may wait
// for a page in the middle of that, with its lock; the lanes that bring the page
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
		// A VM whose disks were given up before, and that never ran since, has none to give up.
		if giveUp, err = s.vm.DisksActive(ctx); err != nil {
			return fmt.Errorf("ask QEMU whether it has the VM's disks: %w", err)
		}
	}
	if err := s.writeDown(); err != nil {
		return err
	}
	reached("source-recorded")

	ctx, expire := context.WithTimeoutCause(ctx, deviceTimeout,
		fmt.Errorf("the device state did not move within %v", deviceTimeout))
	defer expire()
	if err := s.stop(ctx); err != nil {
		return causeOf(ctx, fmt.Errorf("stop the VM: %w", err))
	}
	reached("source-stopped")
	began := time.Now()
	s.gaveUpDisks = giveUp
	state, err := saver.Save(ctx, giveUp)
	if err != nil {
		return causeOf(ctx, fmt.Errorf("save the device state: %w", err))
	}
	s.steps.save = time.Since(began)
	reached("source-saved")
	if _, err := devicestate.Parse(state); err != nil {
		return withRemedy(err, "use a machine type of QEMU 2.4 or newer; if it is one, report this with the version of QEMU")
	}
	stop := context.AfterFunc(ctx, cancel) // the stream was opened before there was a limit
	defer stop()
	return s.sendDevices(ctx, stream, devicestate.Body(state))
}

// openDeviceStream has the destination's QEMU read, up to the first device's state, while the VM still runs.
func (s *Source) openDeviceStream(ctx context.Context) (_ deviceStream, cancel context.CancelFunc, err error) {
	destination := s.cfg.Spec.GetDestination()
	ctx, cancel = context.WithCancel(ctx)
	opening := time.AfterFunc(deviceTimeout, cancel)
	defer opening.Stop()
	failed := func(err error) error { return causeOf(ctx, fromPeer("move the device state", destination, err)) }
	if s.wasRunning, err = s.vm.Running(ctx); err != nil {
		return nil, cancel, causeOf(ctx, fmt.Errorf("ask QEMU whether the VM runs: %w", err))
	}
	stream, err := s.peer.LoadDeviceState(ctx)
	if err != nil {
		return nil, cancel, failed(err)
	}
	asked := time.Now()
	if err := stream.Send(&migratedv1.LoadDeviceStateRequest{
		Id: s.cfg.ID, Paused: !s.wasRunning, Rehearsal: s.cfg.Spec.GetRehearse(), Data: devicestate.Head(s.facts.MachineType),
	}); err != nil {
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
	if ran != s.wasRunning {
		was := s.wasRunning
		s.wasRunning = ran // what it has to be put back to
		return withRemedy(
			fmt.Errorf("somebody else paused or continued it at this moment (running: %t, then %t)", was, ran),
			"migrate it again")
	}
	s.steps.stop = time.Since(began)
	s.stoppedAt = at
	close(s.stopped)
	return nil
}

// sendDevices sends what was saved, and waits until the destination has loaded it.
func (s *Source) sendDevices(ctx context.Context, stream deviceStream, body []byte) error {
	destination := s.cfg.Spec.GetDestination()
	began := time.Now()
	for rest := body; len(rest) > 0; {
		n := min(deviceChunk, len(rest))
		if err := stream.Send(&migratedv1.LoadDeviceStateRequest{Data: rest[:n]}); err != nil {
			if !errors.Is(err, io.EOF) {
				return causeOf(ctx, fmt.Errorf("send the device state: %w", err))
			}
			break // the destination ended the call, and says why
		}
		rest = rest[n:]
	}
	answer, err := stream.CloseAndRecv()
	if err != nil {
		return causeOf(ctx, fromPeer("move the device state", destination, err))
	}
	s.steps.transfer = time.Since(began) - answer.GetCompareTime().AsDuration()
	s.steps.load = answer.GetLoadTime().AsDuration()
	s.log.Info("the device state is loaded", "bytes", len(body), "stop", s.steps.stop, "save", s.steps.save,
		"transfer", s.steps.transfer, "load", s.steps.load)
	s.loaded = answer
	s.update(func(m *migratedv1.Migration) { m.Progress.BytesDeviceState = uint64(len(body)) })
	return nil
}

// steps are what the parts of the downtime took, by this host's clock.
type steps struct{ stop, save, transfer, load, cont time.Duration }
