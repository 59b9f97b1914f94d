// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestNoAllocations checks that the calls on the path of a fault do not allocate, also not when they fail.
func TestNoAllocations(t *testing.T) {
	const runs, pages = 50, 64
	c := uffdtest.Start(t)
	u := c.Supervise(0)
	r := c.Map(uffdtest.Shmem, 3*pages)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	page := uffdtest.Page(uffdtest.Shmem, 1)
	at := func(i uint64) uffd.Range { return uffd.Range{Start: r.Start + i*4096, Len: 4096} }

	// Threads wait in the last third of the pages. Each has made one message.
	for i := range uint64(pages) {
		c.Go(uffdtest.Read(at(2*pages + i).Start)).WaitWaiting()
	}
	buf := uffd.NewEventBuffer(1)
	var e uffd.Event
	var copied, zeroed uint64
	for _, tt := range []struct {
		name string
		call func() error
		want error
	}{
		{"Read", func() error {
			_, err := u.Read(buf)
			e = buf.At(0)
			return err
		}, nil},
		{"Copy", func() error { copied++; _, err := u.Copy(at(copied-1).Start, page, 0); return err }, nil},
		{"Copy, present", func() error { _, err := u.Copy(at(0).Start, page, 0); return err }, uffd.ErrExist},
		{"Zeropage", func() error { zeroed++; _, err := u.Zeropage(at(pages+zeroed-1), 0); return err }, nil},
		{"Zeropage, present", func() error { _, err := u.Zeropage(at(pages), 0); return err }, uffd.ErrExist},
		{"Wake", func() error { return u.Wake(at(0)) }, nil},
		{"Wake, invalid", func() error { return u.Wake(uffd.Range{}) }, uffd.ErrInvalid},
		{"WriteProtect, not registered for it", func() error {
			return u.WriteProtect(at(0), uffd.WPProtect)
		}, uffd.ErrNotRegistered},
	} {
		var wrong error
		if n := testing.AllocsPerRun(runs, func() {
			if err := tt.call(); !errors.Is(err, tt.want) {
				wrong = err
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", tt.name, n)
		}
		if wrong != nil {
			t.Errorf("%s: %v, want %v", tt.name, wrong, tt.want)
		}
	}
	if e.Kind != uffd.EventPagefault {
		t.Errorf("the last event is %v", e.Kind)
	}

	// Read everything, so that nothing is left.
	all := uffd.NewEventBuffer(pages)
	if _, err := u.Read(all); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(runs, func() {
		if _, err := u.Read(all); !errors.Is(err, uffd.ErrWouldBlock) {
			t.Errorf("read: %v", err)
		}
	}); n != 0 {
		t.Errorf("Read, nothing there: %v allocations", n)
	}
}
