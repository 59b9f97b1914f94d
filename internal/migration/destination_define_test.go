// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// ofLibvirt makes the VM that was left a domain of libvirt's, whose source asked for a definition here, or did not.
func (l *left) ofLibvirt(t *testing.T, persistent bool) *libvirttest.Daemon {
	t.Helper()
	daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db", Number: 3, XML: "<domain/>"})
	facts, err := readKept(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	facts.QMP = daemon.Address()
	if facts.Request, err = protojson.Marshal(&migratedv1.PrepareIncomingRequest{
		Id: "m1", Protocol: 1, Token: "secret", PageAddresses: []string{"192.0.2.1:7600"},
		Spec: &migratedv1.MigrationSpec{Persistent: persistent},
	}); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(filepath.Join(l.dir, keptFacts), facts); err != nil {
		t.Fatal(err)
	}
	h := l.kept.header()
	h.toldToRun.Store(1)
	l.ran()
	return daemon
}

// TestTakenUpFilledIsDefined: a daemon that ended between the last page and the domain's definition leaves the latter
// to the next one. It defines the domain before it shows the migration as completed, and says whether libvirt could.
func TestTakenUpFilledIsDefined(t *testing.T) {
	yes, no := true, false
	for name, c := range map[string]struct {
		persistent bool
		prepare    func(*libvirttest.Daemon)
		want       *bool
		called     []string
	}{
		"it can":          {true, func(*libvirttest.Daemon) {}, &yes, []string{"define"}},
		"libvirt refuses": {true, func(d *libvirttest.Daemon) { d.Refuse("define", "the disk is full") }, &no, nil},
		"the VM has ended": {
			true, func(d *libvirttest.Daemon) { d.Change(func(d *libvirttest.Domain) { d.Gone = true }) }, &no, nil,
		},
		"nobody asked": {false, func(*libvirttest.Daemon) {}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			l := leaveDestination(t, true)
			daemon := l.ofLibvirt(t, c.persistent)
			l.kept.header().filled.Store(1)
			c.prepare(daemon)
			taken := make(chan *Destination, 1)
			daemon.Before("define", func() {
				d := <-taken
				if view, _ := d.Snapshot(); Terminal(view.GetState()) {
					t.Errorf("it is %v before the domain is defined", view.GetState())
				}
			})
			d := l.takeUp(t)
			taken <- d
			<-d.Done()
			l.completed(t, d, c.want)
			if called := daemon.Called(); !slices.Equal(called, c.called) {
				t.Errorf("libvirt was asked to %v, want %v", called, c.called)
			}
			daemon.Change(func(d *libvirttest.Domain) { d.Gone = true }) // the next daemon cannot ask
			next := l.takeUp(t)
			<-next.Done()
			l.completed(t, next, c.want)
		})
	}
}

// completed checks that a migration completed, and what it says of the domain's definition.
func (l *left) completed(t *testing.T, d *Destination, defined *bool) {
	t.Helper()
	if view, _ := d.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Errorf("the migration is %v: %v", view.GetState(), view.GetError())
	}
	if got, want := answerOf(d.Defined()), answerOf(defined); got != want {
		t.Errorf("the domain is defined: %s, want %s", got, want)
	}
}

// answerOf returns the words for what a destination says of the domain's definition.
func answerOf(defined *bool) string {
	if defined == nil {
		return "nothing said"
	}
	return strconv.FormatBool(*defined)
}

// TestCompletedIsDefined: with the last page, the domain is defined before the source hears that the migration
// completed. The QEMU of a domain that was started anew here is another VM.
func TestCompletedIsDefined(t *testing.T) {
	yes, no := true, false
	for name, c := range map[string]struct {
		end  bool
		want *bool
	}{"it runs": {false, &yes}, "it was started anew": {true, &no}} {
		t.Run(name, func(t *testing.T) {
			l := leaveDestination(t, true)
			daemon := l.ofLibvirt(t, true)
			d := l.takeUp(t)
			daemon.Before("define", func() {
				if view, _ := d.Snapshot(); Terminal(view.GetState()) {
					t.Errorf("it is %v before the domain is defined", view.GetState())
				}
			})
			if c.end {
				if err := d.left.Kill(t.Context()); err != nil {
					t.Fatal(err)
				}
				daemon.StartAnew()
			}
			d.mu.Lock()
			d.complete()
			l.completed(t, d, c.want) // under mu: the end of QEMU is noticed afterwards
			d.mu.Unlock()
		})
	}
}
