// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

const allEvents = uffd.FeatureEventFork | uffd.FeatureEventRemap | uffd.FeatureEventRemove | uffd.FeatureEventUnmap

func TestBatch(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	u := c.Supervise(uffd.FeatureThreadID)
	const pages = 20
	r := c.Map(uffdtest.Shmem, pages)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	byThread := map[uint32]uint64{}
	var readers []uffdtest.Pending
	for i := range uint64(pages) {
		p := c.Go(uffdtest.Read(r.Start + i*4096))
		readers = append(readers, p)
		byThread[p.ThreadID] = r.Start + i*4096
	}
	for _, p := range readers {
		p.WaitWaiting()
	}

	buf := uffd.NewEventBuffer(16)
	for _, want := range []int{16, 4} { // a full buffer, then the rest
		n, err := u.Read(buf)
		if n != want || err != nil || buf.Len() != want {
			t.Fatalf("read: %d, %v; want %d", n, err, want)
		}
		for i := range n {
			e := buf.At(i)
			if e.Kind != uffd.EventPagefault || byThread[e.Pagefault.ThreadID] != e.Pagefault.Addr {
				t.Errorf("%v of thread %d at %#x, want %#x",
					e.Kind, e.Pagefault.ThreadID, e.Pagefault.Addr, byThread[e.Pagefault.ThreadID])
			}
			delete(byThread, e.Pagefault.ThreadID)
		}
	}
	if n, err := u.Read(buf); n != 0 || buf.Len() != 0 || !errors.Is(err, uffd.ErrWouldBlock) {
		t.Errorf("a third read: %d, %v", n, err)
	}
	if _, err := u.Zeropage(r, 0); err != nil {
		t.Fatal(err)
	}
	for _, p := range readers {
		p.JoinOK()
	}
}

// TestWaiterReady checks that Wait returns when a thread faults, and that a message can then be read.
func TestWaiterReady(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	u := c.Supervise(0)
	r := c.Map(uffdtest.Anon, 1)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	w, err := uffd.NewWaiter(u)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ready := make(chan error)
	go func() { ready <- w.Wait() }()
	reader := c.Go(uffdtest.Read(r.Start))
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	if n, err := u.Read(uffd.NewEventBuffer(1)); n != 1 || err != nil {
		t.Errorf("read: %d, %v", n, err)
	}
	if _, err := u.Zeropage(r, 0); err != nil {
		t.Fatal(err)
	}
	reader.JoinOK()
}

// TestRemove checks that copies fail with ErrAgain until the event is read, and that the discarded page is missing
// again.
func TestRemove(t *testing.T) {
	for _, tt := range []struct {
		kind    uffdtest.Kind
		discard func(uffd.Range) uffdtest.Action
	}{{uffdtest.Anon, uffdtest.Discard}, {uffdtest.Shmem, uffdtest.Punch}} {
		t.Run(tt.kind.String(), func(t *testing.T) {
			c := uffdtest.Start(t)
			u := c.Supervise(allEvents)
			r := c.Map(tt.kind, 2)
			if _, err := u.Register(r, uffd.ModeMissing); err != nil {
				t.Fatal(err)
			}
			first := uffd.Range{Start: r.Start, Len: 4096}
			page := uffdtest.Page(tt.kind, 1)
			if _, err := u.Copy(first.Start, page, 0); err != nil {
				t.Fatal(err)
			}
			discarding := c.Go(tt.discard(first))
			discarding.WaitWaiting()
			if n, err := u.Copy(r.Start+4096, page, 0); n != 0 || !errors.Is(err, uffd.ErrAgain) {
				t.Errorf("copy: %d, %v", n, err)
			}
			if n, err := u.Zeropage(uffd.Range{Start: r.Start + 4096, Len: 4096}, 0); n != 0 || !errors.Is(err, uffd.ErrAgain) {
				t.Errorf("zeropage: %d, %v", n, err)
			}
			e := uffdtest.NextEvents(t, u, 1)[0]
			if e.Kind != uffd.EventRemove || e.Remove.Start != first.Start || e.Remove.End != first.End() {
				t.Fatalf("%v [%#x, %#x)", e.Kind, e.Remove.Start, e.Remove.End)
			}
			discarding.JoinOK()
			reader := c.Go(uffdtest.Read(first.Start))
			uffdtest.NextFault(t, u, first.Start)
			if _, err := u.Zeropage(first, 0); err != nil {
				t.Fatal(err)
			}
			if v := reader.JoinOK(); v != 0 {
				t.Errorf("a discarded page read %#x", v)
			}
		})
	}
}

func TestUnmap(t *testing.T) {
	c := uffdtest.Start(t)
	u := c.Supervise(allEvents)
	r := c.Map(uffdtest.Shmem, 2)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	second := uffd.Range{Start: r.Start + 4096, Len: 4096}
	unmapping := c.Go(uffdtest.Unmap(second))
	e := uffdtest.NextEvents(t, u, 1)[0]
	if e.Kind != uffd.EventUnmap || e.Unmap.Start != second.Start || e.Unmap.End != second.End() {
		t.Fatalf("%v [%#x, %#x)", e.Kind, e.Unmap.Start, e.Unmap.End)
	}
	unmapping.JoinOK()
	if n, err := u.Copy(second.Start, uffdtest.Page(uffdtest.Shmem, 1), 0); n != 0 ||
		!errors.Is(err, uffd.ErrNotRegistered) {
		t.Errorf("copy: %d, %v", n, err)
	}
	// Of a copy across the border, only the first page is still mapped.
	two := append(uffdtest.Page(uffdtest.Shmem, 1), uffdtest.Page(uffdtest.Shmem, 2)...)
	if n, err := u.Copy(r.Start, two, 0); n != 0 || !errors.Is(err, uffd.ErrNotRegistered) {
		t.Errorf("copy across the border: %d, %v", n, err)
	}
}

func TestRemap(t *testing.T) {
	c := uffdtest.Start(t)
	u := c.Supervise(allEvents)
	r := c.Map(uffdtest.Shmem, 1)
	to := c.Map(uffdtest.Anon, 1)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	moving := c.Go(uffdtest.Move(r, to.Start))
	var remaps []uffd.Event
	for _, e := range uffdtest.EventsUntil(t, u, moving) { // the old address may be reported as unmapped, too
		if e.Kind == uffd.EventRemap {
			remaps = append(remaps, e)
		} else if e.Kind != uffd.EventUnmap {
			t.Errorf("%v", e.Kind)
		}
	}
	if len(remaps) != 1 {
		t.Fatalf("%d remap events", len(remaps))
	}
	if e := remaps[0].Remap; e.From != r.Start || e.To != to.Start || e.Len != r.Len {
		t.Errorf("%#x -> %#x, %d bytes", e.From, e.To, e.Len)
	}
	if v := moving.JoinOK(); v != to.Start {
		t.Errorf("moved to %#x", v)
	}
	page := uffdtest.Page(uffdtest.Shmem, 1)
	if n, err := u.Copy(r.Start, page, 0); n != 0 || !errors.Is(err, uffd.ErrNotRegistered) {
		t.Errorf("copy to the old address: %d, %v", n, err)
	}
	if _, err := u.Copy(to.Start, page, 0); err != nil {
		t.Errorf("copy to the new address: %v", err)
	}
}

// TestFork checks that the event of a fork contains the child process's own userfaultfd.
func TestFork(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	u := c.Supervise(allEvents)
	r := c.Map(uffdtest.Anon, 1)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	forking := c.Go(uffdtest.Fork(r.Start))
	e := uffdtest.NextEvents(t, u, 1)[0]
	if e.Kind != uffd.EventFork {
		t.Fatalf("%v", e.Kind)
	}
	theirs := uffd.FromFD(e.Fork.FD)
	defer theirs.Close()
	flags, err := unix.FcntlInt(uintptr(e.Fork.FD), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("close-on-exec is not set (%v)", err)
	}
	uffdtest.NextFault(t, theirs, r.Start)
	page := uffdtest.Page(uffdtest.Anon, 9)
	if _, err := theirs.Copy(r.Start, page, 0); err != nil {
		t.Fatal(err)
	}
	if v := forking.JoinOK(); byte(v) != page[0] {
		t.Errorf("the forked process read %#x, want %#x", v, page[0])
	}
	// The parent's own page is still missing.
	if _, err := u.Copy(r.Start, page, 0); err != nil {
		t.Error(err)
	}
}

// TestForkWithoutEvent checks a fork that is not reported, because FeatureEventFork was not asked for or UFFD_SECURE
// refuses it. The forked process's memory is then not registered. The consequence depends on the kind of
// memory. Because of shared memory, guest RAM must not be inherited; QEMU's is not.
func TestForkWithoutEvent(t *testing.T) {
	for _, tt := range []struct {
		name      string
		kind      uffdtest.Kind
		inherited bool
		sees      int64 // what the forked process reads in a missing page
		shared    bool  // the parent's memory has the same content afterwards
	}{
		{"private: zeros of its own", uffdtest.Anon, true, 0, false},
		{"shared: zeros, which are in everybody's memory", uffdtest.Shmem, true, 0, true},
		{"shared and not inherited: SIGSEGV", uffdtest.Shmem, false, -int64(unix.SIGSEGV), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			c := uffdtest.Start(t)
			u := c.Supervise(allEvents &^ uffd.FeatureEventFork)
			r := c.Map(tt.kind, 2)
			if !tt.inherited {
				if res := c.Do(uffdtest.NotInherited(r)); res.Errno != 0 {
					t.Fatal(res)
				}
			}
			if _, err := u.Register(r, uffd.ModeMissing); err != nil {
				t.Fatal(err)
			}
			second := r.Start + 4096
			waiting := c.Go(uffdtest.Read(second))
			waiting.WaitWaiting()

			if res := c.Do(uffdtest.Fork(r.Start)); res.Value != tt.sees { // Do: it does not wait for us
				t.Errorf("the forked process: %v, want %#x", res, tt.sees)
			}

			// The parent's faults still work: the one from before the fork, and a new one.
			uffdtest.NextFault(t, u, second)
			page := uffdtest.Page(tt.kind, 3)
			if _, err := u.Copy(second, page, 0); err != nil {
				t.Fatal(err)
			}
			if v := waiting.JoinOK(); byte(v) != page[0] {
				t.Errorf("the thread that waited read %#x", v)
			}
			if tt.shared {
				if n, err := u.Copy(r.Start, page, 0); n != 0 || !errors.Is(err, uffd.ErrExist) {
					t.Errorf("copy to the page that the forked process made: %d, %v", n, err)
				}
				if res := c.Do(uffdtest.Read(r.Start)); res.Value != 0 || res.Errno != 0 {
					t.Errorf("the parent reads %v there, want zeros", res)
				}
				return
			}
			reader := c.Go(uffdtest.Read(r.Start))
			uffdtest.NextFault(t, u, r.Start)
			if _, err := u.Copy(r.Start, page, 0); err != nil {
				t.Fatal(err)
			}
			if v := reader.JoinOK(); byte(v) != page[0] {
				t.Errorf("the parent read %#x", v)
			}
		})
	}
}
