// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSetHugePagesDespiteSignals: signals to the thread that reserves huge pages do not make them fewer.
func TestSetHugePagesDespiteSignals(t *testing.T) {
	const size, n = 2 << 20, 8
	before, err := HugePages(size)
	if err != nil {
		CannotRun(t, "%v", err)
	}
	defer func() {
		if _, err := SetHugePages(size, before); err != nil {
			t.Error(err)
		}
	}()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread, stop, stopped := unix.Gettid(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default: // SIGURG is the one that the runtime itself uses
				_ = unix.Tgkill(os.Getpid(), thread, unix.SIGURG)
			}
		}
	}()
	for range 50 {
		if now, err := SetHugePages(size, before+n); err != nil || now != before+n {
			t.Errorf("%d huge pages of %d: %v", now-before, n, err)
		}
		if now, err := SetHugePages(size, before); err != nil || now != before {
			t.Errorf("%d huge pages are left: %v", now-before, err)
		}
	}
	close(stop)
	<-stopped
}

// endsByHand is a test whose end the caller chooses.
type endsByHand struct {
	testing.TB

	cleanup func()
}

func (e *endsByHand) Cleanup(f func()) { e.cleanup = f }

// TestReservationsOverlap: a test that ends takes no huge page from another that began later.
func TestReservationsOverlap(t *testing.T) {
	const size = 2 << 20
	before, err := HugePages(size)
	if err != nil {
		CannotRun(t, "%v", err)
	}
	first, second := &endsByHand{TB: t}, &endsByHand{TB: t}
	ReserveHugePages(first, size, 2)
	defer func() { first.cleanup() }()
	ReserveHugePages(second, size, 3)
	defer func() { second.cleanup() }()
	first.cleanup()
	if now, err := HugePages(size); err != nil || now != before+3 {
		t.Errorf("the second test has %d huge pages of 3: %v", now-before, err)
	}
	second.cleanup()
	if now, err := HugePages(size); err != nil || now != before {
		t.Errorf("%d huge pages are left: %v", now-before, err)
	}
	first.cleanup, second.cleanup = func() {}, func() {}
}
