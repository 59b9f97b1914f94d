// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// word is the value that a thread reads at the start of a page that was filled with p.
func word(p []byte) uint64 { return binary.NativeEndian.Uint64(p) }

// eachKind runs f for each kind of memory, with four missing pages registered with ModeMissing.
func eachKind(
	t *testing.T, want uffd.Features,
	f func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range),
) {
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem, uffdtest.Hugetlb} {
		t.Run(kind.String(), func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			if kind == uffdtest.Hugetlb {
				uffdtest.ReserveHugePages(t, 4)
			}
			c := uffdtest.Start(t)
			u := c.Supervise(want)
			r := c.Map(kind, 4)
			ioctls, err := u.Register(r, uffd.ModeMissing)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := uffd.CanZeropage(ioctls), kind != uffdtest.Hugetlb; got != want {
				t.Errorf("CanZeropage is %v", got)
			}
			f(t, c, u, kind, r)
		})
	}
}

func TestCopy(t *testing.T) {
	eachKind(t, uffd.FeatureThreadID, func(
		t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range,
	) {
		size := kind.PageSize()
		reader := c.Go(uffdtest.Read(r.Start + 8))
		e := uffdtest.NextFault(t, u, r.Start)
		if e.Pagefault.ThreadID != reader.ThreadID || e.Pagefault.Flags != 0 {
			t.Errorf("fault of thread %d with flags %#x, want thread %d, a read",
				e.Pagefault.ThreadID, e.Pagefault.Flags, reader.ThreadID)
		}
		page := uffdtest.Page(kind, 1)
		if n, err := u.Copy(r.Start, page, 0); n != len(page) || err != nil {
			t.Fatalf("copy: %d, %v", n, err)
		}
		if v := reader.JoinOK(); v != word(page[8:]) {
			t.Errorf("the thread read %#x, want %#x", v, word(page[8:]))
		}

		writer := c.Go(uffdtest.Write(r.Start+size, 42))
		if e := uffdtest.NextFault(t, u, r.Start+size); e.Pagefault.Flags != uffd.FaultWrite {
			t.Errorf("flags %#x, want a write", e.Pagefault.Flags)
		}
		if _, err := u.Copy(r.Start+size, page, 0); err != nil {
			t.Fatal(err)
		}
		writer.JoinOK()
		if v := c.Do(uffdtest.Read(r.Start + size)); v.Value != 42 {
			t.Errorf("after the write: %v", v)
		}
	})
}

// TestCopyMany copies several pages in one call, before any thread touches them.
func TestCopyMany(t *testing.T) {
	eachKind(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		var pages []byte
		for i := range uint64(4) {
			pages = append(pages, uffdtest.Page(kind, i)...)
		}
		if n, err := u.Copy(r.Start, pages, 0); n != len(pages) || err != nil {
			t.Fatalf("copy: %d, %v", n, err)
		}
		for off := uint64(0); off < r.Len; off += kind.PageSize() / 2 {
			if v := c.Do(uffdtest.Read(r.Start + off)); uint64(v.Value) != word(pages[off:]) {
				t.Errorf("at %#x: %v, want %#x", off, v, word(pages[off:]))
			}
		}
	})
}

// TestCopyPresent checks EEXIST for a first page that is there, and partial progress up to a later page that is there.
func TestCopyPresent(t *testing.T) {
	eachKind(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		size := kind.PageSize()
		old, fresh := uffdtest.Page(kind, 1), uffdtest.Page(kind, 2)
		if _, err := u.Copy(r.Start+2*size, old, 0); err != nil {
			t.Fatal(err)
		}
		n, err := u.Copy(r.Start+2*size, fresh, 0)
		if n != 0 || !errors.Is(err, uffd.ErrExist) || !errors.Is(err, unix.EEXIST) {
			t.Errorf("present page: %d, %v", n, err)
		}

		waiting := c.Go(uffdtest.Read(r.Start + size))
		uffdtest.NextFault(t, u, r.Start+size)
		all := append(append(append([]byte{}, fresh...), fresh...), fresh...)
		n, err = u.Copy(r.Start, all, 0)
		if uint64(n) != 2*size || !errors.Is(err, uffd.ErrAgain) {
			t.Errorf("two of three pages: %d, %v; want %d and ErrAgain", n, err, 2*size)
		}
		if v := waiting.JoinOK(); v != word(fresh) { // the partial copy woke it
			t.Errorf("the waiting thread read %#x", v)
		}
		if n, err := u.Copy(r.Start+uint64(n), all[n:], 0); n != 0 || !errors.Is(err, uffd.ErrExist) {
			t.Errorf("the rest: %d, %v", n, err)
		}
		if v := c.Do(uffdtest.Read(r.Start + 2*size)); uint64(v.Value) != word(old) {
			t.Errorf("the present page changed: %v", v)
		}
	})
}

// TestDontWake checks that the page is there, and that the thread stays asleep until Wake.
func TestDontWake(t *testing.T) {
	eachKind(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		reader := c.Go(uffdtest.Read(r.Start))
		uffdtest.NextFault(t, u, r.Start)
		reader.WaitWaiting()
		page := uffdtest.Page(kind, 3)
		if _, err := u.Copy(r.Start, page, uffd.CopyDontWake); err != nil {
			t.Fatal(err)
		}
		if !reader.Waiting() {
			t.Error("the thread was woken")
		}
		if err := u.Wake(uffd.Range{Start: r.Start, Len: kind.PageSize()}); err != nil {
			t.Fatal(err)
		}
		if v := reader.JoinOK(); v != word(page) {
			t.Errorf("read %#x", v)
		}
	})
}

func TestZeropage(t *testing.T) {
	eachKind(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		if kind == uffdtest.Hugetlb {
			if n, err := u.Zeropage(r, 0); n != 0 || !errors.Is(err, uffd.ErrInvalid) {
				t.Errorf("hugetlb: %d, %v", n, err)
			}
			return
		}
		size := kind.PageSize()
		first := uffd.Range{Start: r.Start, Len: size}
		reader := c.Go(uffdtest.Read(r.Start))
		uffdtest.NextFault(t, u, r.Start)
		if n, err := u.Zeropage(first, 0); uint64(n) != size || err != nil {
			t.Fatalf("zeropage: %d, %v", n, err)
		}
		if v := reader.JoinOK(); v != 0 {
			t.Errorf("read %#x", v)
		}
		if n, err := u.Zeropage(first, 0); n != 0 || !errors.Is(err, uffd.ErrExist) {
			t.Errorf("again: %d, %v", n, err)
		}
		last := uffd.Range{Start: r.Start + 3*size, Len: size}
		if _, err := u.Copy(last.Start, uffdtest.Page(kind, 1), 0); err != nil {
			t.Fatal(err)
		}
		rest := uffd.Range{Start: r.Start + size, Len: 3 * size}
		if n, err := u.Zeropage(rest, uffd.ZeroDontWake); uint64(n) != 2*size || !errors.Is(err, uffd.ErrAgain) {
			t.Errorf("two of three pages: %d, %v", n, err)
		}
	})
}

func TestRegisterErrors(t *testing.T) {
	c := uffdtest.Start(t)
	u := c.Supervise(0)
	r := c.Map(uffdtest.Anon, 2)
	for _, tt := range []struct {
		name string
		r    uffd.Range
		mode uffd.RegisterMode
		want error
	}{
		{"misaligned", uffd.Range{Start: r.Start + 1, Len: 4096}, uffd.ModeMissing, uffd.ErrInvalid},
		{"empty", uffd.Range{Start: r.Start}, uffd.ModeMissing, uffd.ErrInvalid},
		{"no mode", r, 0, uffd.ErrInvalid},
		{"not mapped", uffd.Range{Start: 1 << 20, Len: 4096}, uffd.ModeMissing, uffd.ErrInvalid},
		{"minor faults of anonymous memory", r, uffd.ModeMinor, uffd.ErrInvalid},
	} {
		if _, err := u.Register(tt.r, tt.mode); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Supervise(0).Register(r, uffd.ModeMissing); !errors.Is(err, uffd.ErrBusy) {
		t.Errorf("another's memory: %v", err)
	}
}

// TestUnregistered checks that a copy then fails with ENOENT, and that a thread that waits reads zeros.
func TestUnregistered(t *testing.T) {
	eachKind(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		reader := c.Go(uffdtest.Read(r.Start))
		uffdtest.NextFault(t, u, r.Start)
		if err := u.Unregister(r); err != nil {
			t.Fatal(err)
		}
		if v := reader.JoinOK(); v != 0 {
			t.Errorf("read %#x", v)
		}
		if n, err := u.Copy(r.Start+kind.PageSize(), uffdtest.Page(kind, 1), 0); n != 0 ||
			!errors.Is(err, uffd.ErrNotRegistered) || !errors.Is(err, unix.ENOENT) {
			t.Errorf("copy: %d, %v", n, err)
		}
		if kind != uffdtest.Hugetlb {
			if n, err := u.Zeropage(r, 0); n != 0 || !errors.Is(err, uffd.ErrNotRegistered) {
				t.Errorf("zeropage: %d, %v", n, err)
			}
		}
	})
}

// TestProcessGone checks the error of each call after the process died.
func TestProcessGone(t *testing.T) {
	eachKind(t, 0, func(t *testing.T, c *uffdtest.Child, u *uffd.UFFD, kind uffdtest.Kind, r uffd.Range) {
		c.Go(uffdtest.Read(r.Start))
		uffdtest.NextFault(t, u, r.Start)
		c.Kill()
		if n, err := u.Copy(r.Start, uffdtest.Page(kind, 1), 0); n != 0 ||
			!errors.Is(err, uffd.ErrProcessGone) || !errors.Is(err, unix.ESRCH) {
			t.Errorf("copy: %d, %v", n, err)
		}
		if n, err := u.Zeropage(r, 0); n != 0 || !errors.Is(err, uffd.ErrProcessGone) {
			t.Errorf("zeropage: %d, %v", n, err)
		}
		if err := u.WriteProtect(r, uffd.WPProtect); !errors.Is(err, uffd.ErrProcessGone) {
			t.Errorf("write protect: %v", err)
		}
		if err := u.Wake(r); err != nil {
			t.Errorf("wake: %v", err)
		}
		if _, err := u.Register(r, uffd.ModeMissing); !errors.Is(err, uffd.ErrNoMemory) {
			t.Errorf("register: %v", err)
		}
		if err := u.Unregister(r); !errors.Is(err, uffd.ErrNoMemory) {
			t.Errorf("unregister: %v", err)
		}
		if _, err := u.Read(uffd.NewEventBuffer(1)); !errors.Is(err, uffd.ErrWouldBlock) {
			t.Errorf("read: %v", err)
		}
	})
}

// TestBeyondFile copies a page beyond the end of a file that was truncated: EFAULT, or ENOMEM in Linux 7.3 (mm/shmem.c,
// shmem_mfill_folio_alloc).
func TestBeyondFile(t *testing.T) {
	c := uffdtest.Start(t)
	u := c.Supervise(0)
	r := c.Map(uffdtest.Shmem, 2)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	c.Truncate(4096)
	want := uffd.ErrFault
	if have, err := uffd.ProbeFeatures(); err != nil {
		t.Fatal(err)
	} else if have&uffd.FeatureRWP != 0 {
		want = uffd.ErrNoMemory
	}
	if n, err := u.Copy(r.Start+4096, uffdtest.Page(uffdtest.Shmem, 1), 0); n != 0 || !errors.Is(err, want) {
		t.Errorf("copy: %d, %v, want %v", n, err, want)
	}
}
