// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

func TestWriteProtect(t *testing.T) {
	uffdtest.Need(t, uffd.FeatureWP|uffd.FeatureWPHugetlbfsShmem)
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem} {
		t.Run(kind.String(), func(t *testing.T) {
			c := uffdtest.Start(t)
			u := c.Supervise(uffd.FeatureWP | uffd.FeatureWPHugetlbfsShmem)
			r := c.Map(kind, 2)
			if err := u.WriteProtect(r, uffd.WPProtect); !errors.Is(err, uffd.ErrNotRegistered) {
				t.Errorf("before registering: %v", err)
			}
			if _, err := u.Register(r, uffd.ModeMissing|uffd.ModeWP); err != nil {
				t.Fatal(err)
			}
			first, second := uffd.Range{Start: r.Start, Len: 4096}, uffd.Range{Start: r.Start + 4096, Len: 4096}
			page := uffdtest.Page(kind, 1)

			// One page is protected after the copy, the other by the copy.
			if _, err := u.Copy(first.Start, page, 0); err != nil {
				t.Fatal(err)
			}
			if err := u.WriteProtect(first, uffd.WPProtect); err != nil {
				t.Fatal(err)
			}
			if _, err := u.Copy(second.Start, page, uffd.CopyWriteProtect); err != nil {
				t.Fatal(err)
			}
			for _, p := range []uffd.Range{first, second} {
				if v := c.Do(uffdtest.Read(p.Start)); uint64(v.Value) != word(page) {
					t.Errorf("a protected page reads %v", v)
				}
				writer := c.Go(uffdtest.Write(p.Start, 7))
				e := uffdtest.NextFault(t, u, p.Start)
				if e.Pagefault.Flags != uffd.FaultWP|uffd.FaultWrite {
					t.Errorf("flags %#x", e.Pagefault.Flags)
				}
				if err := u.WriteProtect(p, 0); err != nil {
					t.Fatal(err)
				}
				writer.JoinOK()
				if v := c.Do(uffdtest.Read(p.Start)); v.Value != 7 {
					t.Errorf("after the write: %v", v)
				}
			}
			if err := u.WriteProtect(first, uffd.WPProtect|uffd.WPDontWake); !errors.Is(err, uffd.ErrInvalid) {
				t.Errorf("both modes: %v", err)
			}
		})
	}
}

// TestContinue maps pages that are in the page cache: a mapping that is not registered wrote them.
func TestContinue(t *testing.T) {
	uffdtest.Need(t, uffd.FeatureMinorShmem|uffd.FeatureMinorHugetlbfs)
	for _, kind := range []uffdtest.Kind{uffdtest.Shmem, uffdtest.Hugetlb} {
		t.Run(kind.String(), func(t *testing.T) {
			if kind == uffdtest.Hugetlb {
				uffdtest.ReserveHugePages(t, 3)
			}
			c := uffdtest.Start(t)
			u := c.Supervise(0)
			r := c.Map(kind, 3)
			size := kind.PageSize()
			other := c.Alias(r)
			if _, err := u.Register(r, uffd.ModeMinor); err != nil {
				t.Fatal(err)
			}
			for i := range uint64(2) {
				c.Do(uffdtest.Write(other+i*size, 100+i))
			}
			reader := c.Go(uffdtest.Read(r.Start))
			if e := uffdtest.NextFault(t, u, r.Start); e.Pagefault.Flags&uffd.FaultMinor == 0 {
				t.Errorf("flags %#x", e.Pagefault.Flags)
			}
			// Two pages are in the page cache, the third is not.
			n, err := u.Continue(r, 0)
			if uint64(n) != 2*size || !errors.Is(err, uffd.ErrAgain) {
				t.Errorf("continue: %d, %v", n, err)
			}
			if v := reader.JoinOK(); v != 100 {
				t.Errorf("read %d", v)
			}
			if n, err := u.Continue(uffd.Range{Start: r.Start + 2*size, Len: size}, 0); n != 0 ||
				!errors.Is(err, uffd.ErrFault) {
				t.Errorf("not in the page cache: %d, %v", n, err)
			}
			if n, err := u.Continue(uffd.Range{Start: r.Start, Len: size}, 0); n != 0 || !errors.Is(err, uffd.ErrExist) {
				t.Errorf("mapped already: %d, %v", n, err)
			}
		})
	}
}

func TestPoison(t *testing.T) {
	uffdtest.Need(t, uffd.FeaturePoison)
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem} {
		t.Run(kind.String(), func(t *testing.T) {
			c := uffdtest.Start(t)
			u := c.Supervise(uffd.FeaturePoison)
			r := c.Map(kind, 2)
			if _, err := u.Register(r, uffd.ModeMissing); err != nil {
				t.Fatal(err)
			}
			reader := c.Go(uffdtest.Read(r.Start))
			uffdtest.NextFault(t, u, r.Start)
			if n, err := u.Poison(r, 0); uint64(n) != r.Len || err != nil {
				t.Fatalf("poison: %d, %v", n, err)
			}
			// Its si_code is BUS_MCEERR_AR, or BUS_ADRERR on a kernel without CONFIG_MEMORY_FAILURE.
			if v := reader.Join(); v.Errno != syscall.Errno(unix.SIGBUS) {
				t.Errorf("the thread: %v, want SIGBUS", v)
			}
			// A copy can still install the page.
			page := uffdtest.Page(kind, 1)
			if _, err := u.Copy(r.Start, page, 0); err != nil {
				t.Errorf("copy over poison: %v", err)
			}
			if v := c.Do(uffdtest.Read(r.Start)); uint64(v.Value) != word(page) {
				t.Errorf("after the copy: %v", v)
			}
			if n, err := u.Poison(r, 0); n != 0 || !errors.Is(err, uffd.ErrExist) {
				t.Errorf("poison over a page: %d, %v", n, err)
			}
		})
	}
}

// TestMove moves memory of this process, as the kernel requires. The test's own thread touches pages only before
// they are registered and after they are installed.
func TestMove(t *testing.T) {
	uffdtest.Need(t, uffd.FeatureMove)
	uffdtest.CheckDescriptors(t)
	u := open(t, uffd.OpenOptions{NonBlocking: true})
	if _, _, err := u.API(uffd.FeatureMove); err != nil {
		t.Fatal(err)
	}
	const size = 4096
	m, err := unix.Mmap(-1, 0, 6*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	base := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m))))
	if err := unix.Madvise(m, unix.MADV_NOHUGEPAGE); err != nil {
		t.Logf("no huge pages here: %v", err)
	}
	src, dst := base, uffd.Range{Start: base + 3*size, Len: 3 * size}
	copy(m[:size], uffdtest.Page(uffdtest.Anon, 5)) // the first of three pages; the others are holes
	if _, err := u.Register(dst, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = u.Unregister(dst) }()

	if n, err := u.Move(dst.Start, src, 3*size, 0); n != size || !errors.Is(err, uffd.ErrAgain) {
		t.Fatalf("a page and two holes: %d, %v", n, err)
	}
	if m[3*size+100] != uffdtest.Page(uffdtest.Anon, 5)[100] {
		t.Error("the page has another content")
	}
	if n, err := u.Move(dst.Start+size, src+size, 2*size, 0); n != 0 || !errors.Is(err, uffd.ErrNotRegistered) {
		t.Errorf("holes: %d, %v", n, err)
	}
	if n, err := u.Move(dst.Start+size, src+size, 2*size, uffd.MoveAllowHoles); n != 2*size || err != nil {
		t.Errorf("holes allowed: %d, %v", n, err)
	}
	copy(m[:size], uffdtest.Page(uffdtest.Anon, 6))
	if n, err := u.Move(dst.Start, src, size, 0); n != 0 || !errors.Is(err, uffd.ErrExist) {
		t.Errorf("onto a page: %d, %v", n, err)
	}

	c := uffdtest.Start(t)
	other := c.Supervise(0)
	theirs := c.Map(uffdtest.Anon, 2)
	if n, err := other.Move(theirs.Start, theirs.Start+size, size, 0); n != 0 || !errors.Is(err, uffd.ErrInvalid) {
		t.Errorf("in another process: %d, %v", n, err)
	}
}
