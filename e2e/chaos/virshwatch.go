// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"

	"github.com/migrated-vm/migrated/e2e/lab"
)

const (
	// virshTurn is how often libvirt is asked, and virshAnswers how long it may take to answer.
	virshTurn    = 100 * time.Millisecond
	virshAnswers = 2 * time.Second
	// lagging is how long a libvirt that answers may be wrong. It and the suite hear at different times that a QEMU has
	// ended, and two processors have much to do.
	lagging = 4 * time.Second
)

// A virshWatch asks both libvirts all the time what a machine does, as virsh would, and compares that with what QEMU
// says by its other socket. It sees nothing only while a libvirtd does not answer: one that has ended, or stands still.
type virshWatch struct {
	end  context.CancelFunc
	done sync.WaitGroup

	mu     sync.Mutex // of wrongs
	wrongs []error    // what libvirt said wrongly for longer than lagging, one for each time
}

// watchVirsh watches until stop.
func watchVirsh(ctx context.Context, m *machine) *virshWatch {
	w := &virshWatch{}
	ctx, w.end = context.WithCancel(ctx)
	for _, h := range m.hosts {
		w.done.Go(func() {
			for ctx.Err() == nil {
				w.follow(ctx, m, h)
				pause(ctx, virshTurn)
			}
		})
	}
	return w
}

// stop returns what was wrong.
func (w *virshWatch) stop() error {
	w.end()
	w.done.Wait()
	return errors.Join(w.wrongs...)
}

// follow asks the libvirtd of a host until it does not answer.
func (w *virshWatch) follow(ctx context.Context, m *machine, h *lab.Host) {
	conn, err := net.Dial("unix", h.Path(lab.LibvirtSocket))
	if err != nil {
		return // it is not there
	}
	defer conn.Close()
	late := time.AfterFunc(virshAnswers, func() { _ = conn.Close() }) // go-libvirt reads on after a deadline
	defer late.Stop()
	libvirt := golibvirt.NewWithDialer(dialers.NewAlreadyConnected(conn))
	if libvirt.ConnectToURI(golibvirt.QEMUSystem) != nil {
		return
	}
	var wrong disagreement
	for ctx.Err() == nil {
		late.Reset(virshAnswers)
		says, err := stateOf(libvirt, m.name)
		if err != nil {
			return
		}
		if is := m.doing(h); wrong.lasts(says, is, time.Now()) {
			w.add(fmt.Errorf("virsh was wrong on host %s from %v on: it said %q of domain %s, which was %q",
				h.Name, wrong.since.Format(time.StampMilli), says, m.name, is))
		}
		pause(ctx, virshTurn)
	}
}

func (w *virshWatch) add(wrong error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrongs = append(w.wrongs, wrong)
}

// A disagreement is a difference between what libvirt says and the truth.
type disagreement struct {
	since time.Time // zero: there is none
	told  bool
}

// lasts returns true once when the disagreement goes on for longer than it may.
func (d *disagreement) lasts(says, is string, now time.Time) bool {
	switch {
	case agree(says, is):
		*d = disagreement{}
	case d.since.IsZero():
		d.since = now
	case now.Sub(d.since) > lagging && !d.told:
		d.told = true
		return true
	}
	return false
}

// stateOf returns what virsh would say of a domain; empty: there is none.
func stateOf(libvirt *golibvirt.Libvirt, name string) (string, error) {
	d, err := libvirt.DomainLookupByName(name)
	if err == nil {
		var state int32
		if state, _, err = libvirt.DomainGetState(d, 0); err == nil {
			return states[golibvirt.DomainState(state)], nil
		}
	}
	var refused golibvirt.Error
	if errors.As(err, &refused) && golibvirt.ErrorNumber(refused.Code) == golibvirt.ErrNoDomain {
		return "", nil
	}
	return "", err
}

// inShutdown is the state of a domain whose guest has powered off, until libvirt has ended its QEMU.
const inShutdown = "in shutdown"

// states are virsh's names of the states.
var states = map[golibvirt.DomainState]string{
	golibvirt.DomainNostate: "no state", golibvirt.DomainRunning: "running", golibvirt.DomainBlocked: "idle",
	golibvirt.DomainPaused: "paused", golibvirt.DomainShutdown: inShutdown, golibvirt.DomainShutoff: "shut off",
	golibvirt.DomainCrashed: "crashed", golibvirt.DomainPmsuspended: "pmsuspended",
}

// doing returns what the machine does on a host, by its process and the events of its QEMU.
func (m *machine) doing(h *lab.Host) string {
	switch {
	case !m.exists(h):
		return ""
	case m.copies.runs(h):
		return "running"
	default:
		return "paused"
	}
}

// agree reports whether libvirt is right.
func agree(says, is string) bool { return says == is || says == inShutdown && is == "paused" }
