// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// These tests need Linux 7.3. e2e/kernel/rwp runs them in such a kernel.

const rwpPages = 8

// eachRWP runs f for each kind of memory, registered with ModeRWP. All pages but the last have content.
func eachRWP(
	t *testing.T, want uffd.Features,
	f func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range),
) {
	uffdtest.Need(t, uffd.FeatureRWP|want)
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem, uffdtest.Hugetlb} {
		t.Run(kind.String(), func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			if kind == uffdtest.Hugetlb {
				uffdtest.ReserveHugePages(t, rwpPages)
			}
			c := uffdtest.Start(t)
			u := c.Supervise(uffd.FeatureRWP | want)
			r := c.Map(kind, rwpPages)
			for page := range uint64(rwpPages - 1) {
				c.Do(uffdtest.Write(r.Start+page*kind.PageSize(), 100+page))
			}
			if err := u.RWProtect(r, uffd.RWPProtect); !errors.Is(err, uffd.ErrNotRegistered) {
				t.Errorf("before registering: %v", err)
			}
			if _, err := u.Register(r, uffd.ModeRWP); err != nil {
				t.Fatal(err)
			}
			f(t, c, u, kind, r)
		})
	}
}

// TestRWProtect checks that a thread that reads or writes a protected page waits until the protection is lifted, and
// that the page keeps its content.
func TestRWProtect(t *testing.T) {
	eachRWP(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		page := func(i uint64) uffd.Range { return uffd.Range{Start: r.Start + i*kind.PageSize(), Len: kind.PageSize()} }
		if err := u.RWProtect(r, uffd.RWPProtect); err != nil {
			t.Fatal(err)
		}
		for i, access := range []struct {
			do    uffdtest.Action
			flags uffd.FaultFlags
			value uint64 // the action's value
			after int64  // the page's content afterwards
		}{
			{uffdtest.Read(page(0).Start), uffd.FaultRWP, 100, 100},
			{uffdtest.Write(page(1).Start, 7), uffd.FaultRWP | uffd.FaultWrite, 0, 7},
		} {
			p := page(uint64(i))
			waiting := c.Go(access.do)
			e := uffdtest.NextFault(t, u, p.Start)
			if e.Pagefault.Flags != access.flags {
				t.Errorf("flags %#x, want %#x", e.Pagefault.Flags, access.flags)
			}
			waiting.WaitWaiting()
			if err := u.RWProtect(p, uffd.RWPDontWake); err != nil {
				t.Fatal(err)
			}
			if !waiting.Waiting() {
				t.Error("the thread was woken")
			}
			if err := u.Wake(p); err != nil {
				t.Fatal(err)
			}
			if v := waiting.JoinOK(); v != access.value {
				t.Errorf("it reads %d, want %d", v, access.value)
			}
			if v := c.Do(uffdtest.Read(p.Start)); v.Value != access.after {
				t.Errorf("after the access: %v, want %d", v, access.after)
			}
		}
		// The last page was missing at RWProtect and is not protected: no thread waits for it.
		if v := c.Do(uffdtest.Read(page(rwpPages - 1).Start)); v.Value != 0 || v.Errno != 0 {
			t.Errorf("a page that was not there: %v", v)
		}
		// Unregister lifts the protection. A thread that waits already needs a Wake.
		waiting := c.Go(uffdtest.Read(page(2).Start))
		uffdtest.NextFault(t, u, page(2).Start)
		if err := errors.Join(u.Unregister(r), u.Wake(r)); err != nil {
			t.Fatal(err)
		}
		if v := waiting.JoinOK(); v != 102 {
			t.Errorf("it reads %d", v)
		}
		if v := c.Do(uffdtest.Read(page(3).Start)); v.Value != 103 {
			t.Errorf("after Unregister: %v", v)
		}
	})
}

// TestWorkingSet checks that with FeatureRWPAsync no access waits, and that a scan finds exactly the pages that were
// touched.
func TestWorkingSet(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PageAccessed)
	eachRWP(t, uffd.FeatureRWPAsync, func(
		t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range,
	) {
		p := openPagemap(t, c.Pid)
		accessed := uffd.PageQuery{All: uffd.PageAccessed, Return: uffd.PageAccessed}
		cold := uffd.PageQuery{
			All: uffd.PageAccessed | uffd.PagePresent, Inverted: uffd.PageAccessed, Return: uffd.PageAccessed,
		}
		look := func(q uffd.PageQuery) map[int]uffd.Categories { return pagesOf(t, r, kind, scan(t, p, r, q, 2)) }

		if diff := cmp.Diff(each(uffd.PageAccessed, 0, 1, 2, 3, 4, 5, 6), look(accessed)); diff != "" {
			t.Errorf("before the first RWProtect (-want +got):\n%s", diff)
		}
		for _, interval := range []struct{ read, written, accessed, cold []int }{
			{nil, nil, nil, []int{0, 1, 2, 3, 4, 5, 6}},
			{[]int{1, 2}, []int{5}, []int{1, 2, 5}, []int{0, 3, 4, 6}},
			{[]int{6}, nil, []int{6}, []int{0, 1, 2, 3, 4, 5}},
			{[]int{0}, []int{7}, []int{0, 7}, []int{1, 2, 3, 4, 5, 6}}, // page 7 is new
			{nil, nil, nil, []int{0, 1, 2, 3, 4, 5, 6, 7}},
		} {
			if err := u.RWProtect(r, uffd.RWPProtect); err != nil {
				t.Fatal(err)
			}
			for _, page := range interval.read {
				if v := c.Do(uffdtest.Read(r.Start + uint64(page)*kind.PageSize())); v.Value != int64(100+page) {
					t.Errorf("page %d reads %v", page, v)
				}
			}
			for _, page := range interval.written {
				c.Do(uffdtest.Write(r.Start+uint64(page)*kind.PageSize(), uint64(100+page)))
			}
			if diff := cmp.Diff(each(uffd.PageAccessed, interval.accessed...), look(accessed)); diff != "" {
				t.Errorf("after reads of %d, writes to %d (-want +got):\n%s", interval.read, interval.written, diff)
			}
			if diff := cmp.Diff(each(0, interval.cold...), look(cold)); diff != "" {
				t.Errorf("not touched (-want +got):\n%s", diff)
			}
		}
		if kind == uffdtest.Shmem { // access by another mapping of the file is not reported
			if v := c.Do(uffdtest.Read(c.Alias(r) + 2*4096)); v.Value != 102 {
				t.Errorf("another mapping reads %v", v)
			}
			if diff := cmp.Diff(each(0), look(accessed)); diff != "" {
				t.Errorf("after a read of another mapping (-want +got):\n%s", diff)
			}
		}
		events := uffd.NewEventBuffer(1)
		if _, err := u.Read(events); !errors.Is(err, uffd.ErrWouldBlock) {
			t.Errorf("a message came: %v, %v", events.At(0).Kind, err)
		}
	})
}

// TestOwnWorkingSet finds the working set of this Go program, as the example does.
func TestOwnWorkingSet(t *testing.T) {
	uffdtest.Need(t, uffd.FeatureRWP|uffd.FeatureRWPAsync)
	uffdtest.CheckDescriptors(t)
	memory, err := unix.Mmap(-1, 0, 64*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	for i := range memory {
		memory[i] = 1
	}
	pages, err := touched(memory, func() { memory[5*4096], memory[40*4096] = 2, memory[6*4096] })
	if diff := cmp.Diff([]uint64{5, 6, 40}, pages); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if memory[6*4096] != 1 || memory[5*4096] != 2 || memory[63*4096] != 1 {
		t.Error("the memory is not what it was")
	}
}

// TestSetMode switches FeatureRWPAsync off and on again. Switching it on wakes a thread that waits.
func TestSetMode(t *testing.T) {
	eachRWP(t, uffd.FeatureRWPAsync, func(
		t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range,
	) {
		if err := u.RWProtect(r, uffd.RWPProtect); err != nil {
			t.Fatal(err)
		}
		if v := c.Do(uffdtest.Read(r.Start)); v.Value != 100 {
			t.Errorf("asynchronous: %v", v)
		}
		if err := u.SetMode(0, uffd.FeatureRWPAsync); err != nil {
			t.Fatal(err)
		}
		waiting := c.Go(uffdtest.Read(r.Start + kind.PageSize()))
		e := uffdtest.NextFault(t, u, r.Start+kind.PageSize())
		if e.Pagefault.Flags != uffd.FaultRWP {
			t.Errorf("flags %#x", e.Pagefault.Flags)
		}
		if err := u.SetMode(uffd.FeatureRWPAsync, 0); err != nil {
			t.Fatal(err)
		}
		if v := waiting.JoinOK(); v != 101 {
			t.Errorf("it reads %d", v)
		}
		for name, err := range map[string]error{
			"both":                u.SetMode(uffd.FeatureRWPAsync, uffd.FeatureRWPAsync),
			"not to be changed":   u.SetMode(uffd.FeatureThreadID, 0),
			"not to be taken off": u.SetMode(0, uffd.FeatureRWP),
		} {
			if !errors.Is(err, uffd.ErrInvalid) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestRWPErrors(t *testing.T) {
	uffdtest.Need(t, uffd.FeatureRWP|uffd.FeatureRWPAsync|uffd.FeatureWP)
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	r := c.Map(uffdtest.Anon, 2)
	alone := c.NewUFFD(uffd.OpenSyscall)
	_, _, err := alone.API(uffd.FeatureRWPAsync)
	if !errors.Is(err, uffd.ErrInvalid) || !strings.Contains(err.Error(), "only with UFFD_FEATURE_RWP") {
		t.Errorf("RWP_ASYNC without RWP: %v", err)
	}
	without := c.Supervise(0)
	if _, err := without.Register(r, uffd.ModeRWP); !errors.Is(err, uffd.ErrInvalid) {
		t.Errorf("without the feature: %v", err)
	}
	if err := without.SetMode(uffd.FeatureRWPAsync, 0); !errors.Is(err, uffd.ErrInvalid) {
		t.Errorf("SetMode without the feature: %v", err)
	}
	u := c.Supervise(uffd.FeatureRWP | uffd.FeatureWP)
	if _, err := u.Register(r, uffd.ModeRWP|uffd.ModeWP); !errors.Is(err, uffd.ErrInvalid) {
		t.Errorf("with ModeWP: %v", err)
	}
	if _, err := u.Register(r, uffd.ModeRWP|uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Register(r, uffd.ModeMissing); !errors.Is(err, uffd.ErrBusy) {
		t.Errorf("again, without ModeRWP: %v", err)
	}
	if err := u.RWProtect(r, uffd.RWPProtect|uffd.RWPDontWake); !errors.Is(err, uffd.ErrInvalid) {
		t.Errorf("both modes: %v", err)
	}
	if err := u.RWProtect(uffd.Range{Start: r.Start + 1, Len: r.Len}, uffd.RWPProtect); !errors.Is(err, uffd.ErrInvalid) {
		t.Errorf("misaligned: %v", err)
	}
	other := c.Map(uffdtest.Anon, 1)
	if n := testing.AllocsPerRun(50, func() {
		if err := u.RWProtect(r, uffd.RWPProtect); err != nil {
			t.Error(err)
		}
		if err := u.RWProtect(other, uffd.RWPProtect); !errors.Is(err, uffd.ErrNotRegistered) {
			t.Errorf("memory that is not registered: %v", err)
		}
	}); n != 0 {
		t.Errorf("RWProtect: %v allocations", n)
	}
	c.Kill()
	if err := u.RWProtect(r, uffd.RWPProtect); !errors.Is(err, uffd.ErrProcessGone) {
		t.Errorf("the process is gone: %v", err)
	}
	if err := u.SetMode(uffd.FeatureRWPAsync, 0); !errors.Is(err, uffd.ErrProcessGone) {
		t.Errorf("SetMode, the process is gone: %v", err)
	}
}
