// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"
)

const (
	// lastEvents is for how long no event has come of a QEMU that has ended when none will.
	lastEvents = 100 * time.Millisecond
	// stoppedTimeout is how long libvirt may take to say how a domain has ended whose QEMU has.
	stoppedTimeout = 8 * time.Second
)

// follow sends QEMU's events on, until QEMU has ended. endings are of all domains.
func (m *monitor) follow(
	life context.Context, events <-chan golibvirt.DomainEvent, endings <-chan golibvirt.DomainEventLifecycleMsg,
	ended <-chan struct{},
) {
	defer m.conn.Close()
	var toldToEnd, destroyed bool
	var late, quiet <-chan time.Time // of a QEMU that has ended
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			toldToEnd = toldToEnd || e.Event == "SHUTDOWN"
			m.forward(e)
			if quiet != nil {
				quiet = time.After(lastEvents)
			}
		case e, open := <-endings:
			if !open {
				return
			}
			if e.Dom.UUID == m.domain.id.UUID && e.Event == int32(golibvirt.DomainEventStopped) {
				destroyed = e.Detail == int32(golibvirt.DomainEventStoppedDestroyed)
				quiet = time.After(lastEvents)
			}
		case <-ended: // what was said before may be on its way
			ended, late = nil, time.After(stoppedTimeout)
		case <-late:
			return
		case <-quiet:
			if destroyed && !toldToEnd { // libvirt, which ends QEMU by a signal, may be too busy with it to pass this on
				m.send(map[string]any{"event": "SHUTDOWN", "data": map[string]any{"guest": false, "reason": "host-signal"}})
			}
			return
		case <-life.Done():
			return
		}
	}
}

// watch returns a channel that is closed when QEMU has ended.
func (m *monitor) watch(life context.Context) (<-chan struct{}, error) {
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process of QEMU: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		defer unix.Close(pidfd)
		const turn = 200 // ms, in which an end of the connection is noticed
		for life.Err() == nil {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, turn)
			if n > 0 || err != nil && err != unix.EINTR {
				close(ended)
				return
			}
		}
	}()
	return ended, nil
}

// forward sends an event.
func (m *monitor) forward(e golibvirt.DomainEvent) {
	message := map[string]any{
		"event":     e.Event,
		"timestamp": map[string]uint64{"seconds": e.Seconds, "microseconds": uint64(e.Microseconds)},
	}
	if data := json.RawMessage(bytes.TrimRight(e.Details, "\x00")); len(data) > 0 {
		message["data"] = data
	}
	m.send(message)
	if e.Event == "STOP" || e.Event == "RESUME" {
		m.mu.Lock()
		m.running = e.Event == "RESUME"
		m.mu.Unlock()
		select {
		case m.changed <- struct{}{}:
		default:
		}
	}
}
