// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// listen hears what the VM's first network card announces, and fails the test where it did before a moment.
func (s *scene) listen() (awaitOne func(after time.Time), none func(when string)) {
	s.Helper()
	p, err := s.lab.Ping(s.vm, 0, time.Minute)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		if _, err := p.Stop(); err != nil {
			s.Error(err)
		}
	})
	ctx := testContext(s.T)
	awaitOne = func(after time.Time) {
		s.Helper()
		for {
			if a, ok := p.FirstAnnouncement(after); ok {
				s.Logf("announced %v after that", a.At.Sub(after))
				return
			}
			select {
			case <-ctx.Done():
				s.Fatal("the VM's network card is not announced")
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	began := time.Now()
	return awaitOne, func(when string) {
		s.Helper()
		if a, ok := p.FirstAnnouncement(began); ok {
			s.Errorf("%s the VM's network card was announced, %v after the beginning", when, a.At.Sub(began))
		}
	}
}

// TestAnnouncements: a destination that did not get the VM does not say that it is there, and neither does one whose VM
// is paused until somebody continues it.
func TestAnnouncements(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	awaitOne, none := s.listen()
	s.template(templateWithoutMSIX)
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	s.failed(migrateSpec(t, l.A, "other", spec), stateFailed, "could not load the device state")
	if err := os.Remove(l.B.Path(templatePath)); err != nil {
		t.Error(err)
	}
	none("after a migration that failed")
	command(t, l.A, "stop")
	migrate(t, l.A, l.B, "paused")
	none("of a paused VM")
	continued := time.Now()
	command(t, l.B, "cont")
	awaitOne(continued)
	s.arrived()
}

// TestAnnouncedAfterFallBack: the destination may have said that the VM is there.
func TestAnnouncedAfterFallBack(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.halfway("lost")
	kill(t, qemuOn(t, l.B), syscall.SIGKILL)
	s.cable(true)
	client := control(t, l.A)
	await(t, client, "lost", func(m *migratedv1.Migration) bool { return false })
	awaitOne, _ := s.listen()
	before := time.Now()
	if _, err := client.FallBack(testContext(t), &migratedv1.FallBackRequest{Id: "lost", DestinationIsGone: true}); err != nil {
		t.Fatal(err)
	}
	awaitOne(before)
	s.countsOn()
}

// TestPausedVMFallsBack: it has its disks again, as far as its QEMU can have them without running it, and can be moved.
func TestPausedVMFallsBack(t *testing.T) {
	t.Parallel()
	for _, version := range []string{lab.InstalledQEMU, "10.0"} {
		t.Run(version, func(t *testing.T) {
			l := newHosts(t)
			for _, h := range []*lab.Host{l.A, l.B} {
				useQEMU(t, h, version)
				startDaemon(t, h)
			}
			s := largeScene(t, l, 1)
			command(t, l.A, "stop")
			s.halfway("lost")
			kill(t, qemuOn(t, l.B), syscall.SIGKILL)
			s.cable(true)
			client := control(t, l.A)
			await(t, client, "lost", func(*migratedv1.Migration) bool { return false })
			if _, err := client.FallBack(testContext(t), &migratedv1.FallBackRequest{Id: "lost", DestinationIsGone: true}); err != nil {
				t.Fatal(err)
			}
			if status := vmStatus(t, l.A); status != "paused" {
				t.Errorf("the VM is %q", status)
			}
			active, err := inspect(t, l.A).DisksActive(testContext(t))
			if able := version != lab.InstalledQEMU; err != nil || able && !active {
				t.Errorf("it has its disks: %t, %v", active, err)
			}
			migrate(t, l.A, l.B, "again")
			command(t, l.B, "cont")
			s.arrived()
		})
	}
}
