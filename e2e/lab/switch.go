// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// EventsPath is a second QMP socket, on which a test watches a VM. The
// daemon uses the first one.
const EventsPath = VMDir + "/events.sock"

// EventsArgs are the arguments of QEMU for that second socket.
func EventsArgs() []string { return []string{"-qmp", "unix:" + EventsPath + ",server=on,wait=off"} }

// SwitchWatch measures a VM's switch from one host to the other by QEMU's own
// events. Both hosts of a lab have the same clock.
type SwitchWatch struct {
	client *qmp.Client
	events *qmp.Subscription
	from   *Host
	to     *Host
	path   string // of that socket, on both
}

// WatchSwitch starts to watch the VM that runs on host from.
func (l *Lab) WatchSwitch(ctx context.Context, from, to *Host) (*SwitchWatch, error) {
	return l.WatchSwitchAt(ctx, from, to, EventsPath)
}

// WatchSwitchAt is WatchSwitch for a VM whose second QMP socket has another path.
func (l *Lab) WatchSwitchAt(ctx context.Context, from, to *Host, path string) (*SwitchWatch, error) {
	client, err := qmp.Dial(ctx, from.Path(path))
	if err != nil {
		return nil, err
	}
	return &SwitchWatch{client: client, events: client.Subscribe("STOP"), from: from, to: to, path: path}, nil
}

// Switch has the times at which the VM stopped on one host and ran on the other.
type Switch struct{ Stopped, Resumed time.Time }

// Downtime is the time from the source's STOP event to the destination's RESUME event.
func (s Switch) Downtime() time.Duration { return s.Resumed.Sub(s.Stopped) }

// Wait waits for the switch. Before it, the source's VM may stop for a moment, and the destination's QEMU may be
// replaced.
func (w *SwitchWatch) Wait(ctx context.Context) (Switch, error) {
	defer w.client.Disconnect() //nolint:errcheck // it was only read from
	resumed, err := w.awaitResume(ctx)
	if err != nil {
		return Switch{}, fmt.Errorf("RESUME on host %s: %w", w.to.Name, err)
	}
	var stopped time.Time
	for {
		stop, err := Next(ctx, w.events)
		if err != nil {
			return Switch{}, fmt.Errorf("STOP on host %s: %w", w.from.Name, err)
		}
		stopped = stop.Time
		if len(w.events.Events()) == 0 {
			return Switch{Stopped: stopped, Resumed: resumed}, nil
		}
	}
}

// During calls move, which moves the VM, and returns the switch after move has returned. It calls switched, unless that
// is nil, as soon as the VM runs on the other host.
func (w *SwitchWatch) During(ctx context.Context, move func() error, switched func()) (s Switch, err error) {
	watching, cancel := context.WithCancel(ctx) // if move fails, the wait for the switch ends
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if s, err = w.Wait(watching); err == nil && switched != nil {
			switched()
		}
	}()
	if moveErr := move(); moveErr != nil {
		cancel()
		<-done
		return Switch{}, moveErr
	}
	<-done
	return s, err
}

func (w *SwitchWatch) awaitResume(ctx context.Context) (time.Time, error) {
	for {
		destination, err := w.dialDestination(ctx)
		if err != nil {
			return time.Time{}, err
		}
		resumed, err := Next(ctx, destination.Subscribe("RESUME"))
		_ = destination.Disconnect() // it was only read from
		if !errors.Is(err, errQEMUEnded) {
			return resumed.Time, err
		}
	}
}

var errQEMUEnded = errors.New("QEMU ended")

// dialDestination waits until the destination QEMU has started and connects to it.
func (w *SwitchWatch) dialDestination(ctx context.Context) (*qmp.Client, error) {
	for {
		client, err := qmp.Dial(ctx, w.to.Path(w.path))
		if err == nil {
			return client, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no destination QEMU on host %s: %w", w.to.Name, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Next returns the next event of a QEMU.
func Next(ctx context.Context, s *qmp.Subscription) (qmp.Event, error) {
	select {
	case e, ok := <-s.Events():
		if !ok {
			return qmp.Event{}, errQEMUEnded
		}
		return e, nil
	case <-ctx.Done():
		return qmp.Event{}, ctx.Err()
	}
}
