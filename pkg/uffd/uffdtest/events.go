// SPDX-License-Identifier: Apache-2.0

package uffdtest

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// NextEvents reads until it has at least want events. It fails the test after patience.
func NextEvents(t testing.TB, u *uffd.UFFD, want int) []uffd.Event {
	t.Helper()
	return readUntil(t, u, func(events []uffd.Event) bool { return len(events) >= want })
}

// EventsUntil reads events until the thread has ended. An action may make several events, and its thread
// waits until each is read.
func EventsUntil(t testing.TB, u *uffd.UFFD, p Pending) []uffd.Event {
	t.Helper()
	return readUntil(t, u, func([]uffd.Event) bool { return p.Ended() })
}

func readUntil(t testing.TB, u *uffd.UFFD, enough func([]uffd.Event) bool) []uffd.Event {
	t.Helper()
	buf := uffd.NewEventBuffer(16)
	var events []uffd.Event
	for deadline := time.Now().Add(patience); !enough(events); {
		if time.Now().After(deadline) {
			t.Fatalf("not the events that were to come within %v: %v", patience, events)
		}
		fds := []unix.PollFd{{Fd: int32(u.FD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, 10); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		n, err := u.Read(buf)
		if err != nil && !errors.Is(err, uffd.ErrWouldBlock) {
			t.Fatal(err)
		}
		for i := range n {
			events = append(events, buf.At(i))
		}
	}
	return events
}

// NextFault reads one event and returns it. It must be a fault in the page at addr.
func NextFault(t testing.TB, u *uffd.UFFD, addr uint64) uffd.Event {
	t.Helper()
	e := NextEvents(t, u, 1)[0]
	if e.Kind != uffd.EventPagefault || e.Pagefault.Addr != addr {
		t.Fatalf("event %v at %#x, want a fault at %#x", e.Kind, e.Pagefault.Addr, addr)
	}
	return e
}
