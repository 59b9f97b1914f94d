// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// listen receives the announcements of the VM's first network card until the test ends. awaitOne waits for an
// announcement after a time. none fails the test if there was an announcement since listen was called; when is for the
// message.
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
	awaitOne = func(after time.Time) {
		s.Helper()
		eventually(s.T, func() error {
			a, ok := p.FirstAnnouncement(after)
			if !ok {
				return errors.New("the VM's network card is not announced")
			}
			s.Logf("announced %v after that", a.At.Sub(after))
			return nil
		})
	}
	began := time.Now()
	return awaitOne, func(when string) {
		s.Helper()
		if a, ok := p.FirstAnnouncement(began); ok {
			s.Errorf("%s the VM's network card was announced, %v after the beginning", when, a.At.Sub(began))
		}
	}
}

// TestAnnouncements checks that a destination that did not get the VM does not announce it. A destination with a paused
// VM announces it only when somebody continues it.
func TestAnnouncements(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	awaitOne, none := s.listen()
	s.writeTemplate(templateWithoutMSIX)
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	s.failed(migrateSpec(t, l.A, "other", spec), stateFailed, "could not load the device state")
	if err := os.Remove(l.B.Path(templatePath)); err != nil {
		t.Error(err)
	}
	none("after a migration that failed")
	command(t, l.A, "stop")
	migrate(t, l.A, l.B, "paused")
	// QEMU announces a VM several times, for about a second. The VM moves back meanwhile.
	migrate(t, l.B, l.A, "back")
	none("of a paused VM")
	continued := time.Now()
	command(t, l.A, "cont")
	awaitOne(continued)
	s.countsAtSource()
}

// TestAnnouncedAfterFallBack: the source announces the VM after a fall-back, because the destination may have announced
// it before.
func TestAnnouncedAfterFallBack(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	s.moveHalfway("lost")
	kill(t, qemuOn(t, l.B), syscall.SIGKILL)
	s.cable(true)
	client := control(t, l.A)
	awaitEnd(t, client, "lost")
	awaitOne, _ := s.listen()
	before := time.Now()
	fallBack(t, client, "lost")
	awaitOne(before)
	s.countsAtSource()
}

// TestPausedVMFallsBack checks that a paused VM can be moved after a fall-back. It has its disks again if QEMU can
// activate them without running the VM, which the installed version cannot.
func TestPausedVMFallsBack(t *testing.T) {
	t.Parallel()
	for _, version := range []string{lab.InstalledQEMU, "10.0"} {
		t.Run(version, func(t *testing.T) {
			l := newHosts(t)
			for _, h := range l.Hosts() {
				useQEMU(t, h, version)
				startDaemon(t, h)
			}
			s := largeScene(t, l, 1)
			command(t, l.A, "stop")
			s.moveHalfway("lost")
			kill(t, qemuOn(t, l.B), syscall.SIGKILL)
			s.cable(true)
			client := control(t, l.A)
			awaitEnd(t, client, "lost")
			fallBack(t, client, "lost")
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
