// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"encoding/json"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

const (
	// lastEvents is how long to wait for another event of a QEMU that has ended.
	lastEvents = 100 * time.Millisecond
	// stoppedTimeout is how long to wait for libvirt to say how a domain ended, after its QEMU has ended.
	stoppedTimeout = 8 * time.Second
)

// follow forwards QEMU's events to the client until QEMU has ended, and closes the connection. endings are the
// lifecycle events of all domains. Events of a later run of the domain are left out: isOf.
func (m *monitor) follow(
	life context.Context, events <-chan golibvirt.DomainEvent, endings <-chan golibvirt.DomainEventLifecycleMsg,
) {
	defer close(m.followed)
	defer m.conn.Close()
	defer drop(events)
	defer drop(endings)
	var toldToEnd, destroyed bool
	ended := m.ended
	var late, quiet <-chan time.Time // set when QEMU has ended: follow returns when either fires
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			if !m.isOf(e.Domain) {
				continue
			}
			switch e.Event {
			case "SHUTDOWN":
				toldToEnd = true
			case "RESET", "RESUME": // the VM goes on: libvirt has a guest that powered off start again, for a reboot
				toldToEnd = false
			}
			m.forward(e)
			if quiet != nil {
				quiet = time.After(lastEvents)
			}
		case e, open := <-endings:
			if !open {
				return
			}
			if m.isOf(e.Dom) && e.Event == int32(golibvirt.DomainEventStopped) {
				destroyed = e.Detail == int32(golibvirt.DomainEventStoppedDestroyed)
				quiet = time.After(lastEvents)
			}
		case <-ended: // earlier events may still be on their way
			ended, late = nil, time.After(stoppedTimeout)
		case <-late:
			return
		case <-quiet:
			if destroyed && !toldToEnd { // libvirt ended QEMU by a signal, and did not forward the event
				m.send(map[string]any{"event": "SHUTDOWN", "data": map[string]any{"guest": false, "reason": "host-signal"}})
			}
			return
		case <-life.Done():
			return
		}
	}
}

// isOf says whether an event's domain is the run of m. Its number may be -1: libvirt takes the number away when a run
// ends, and a later run that goes on has one.
func (m *monitor) isOf(d golibvirt.Domain) bool {
	return d.UUID == m.domain.id.UUID && (d.ID == m.domain.id.ID || d.ID < 0)
}

// drop reads events and drops them until the connection to libvirt ends, because their sender waits for a reader.
func drop[T any](events <-chan T) {
	go func() {
		for range events {
		}
	}()
}

// watch opens QEMU's process, and closes m.ended when that has ended. The caller closes m.process.
func (m *monitor) watch(life context.Context) (err error) {
	if m.process, err = process.Open(m.pid); err != nil {
		return err
	}
	ended := make(chan struct{})
	m.ended = ended
	go func() {
		if m.process.Wait(life) == nil {
			close(ended)
		}
	}()
	return nil
}

// forward sends an event to the client, and keeps m.running up to date.
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
