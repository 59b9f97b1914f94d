// SPDX-License-Identifier: Apache-2.0

package uffd_test

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

func openPagemap(t testing.TB, pid int) *uffd.Pagemap {
	t.Helper()
	p, err := uffd.OpenPagemap(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// scan returns everything that a query finds in r, with calls for room regions each. It joins a region that continues
// in the answer of the next call.
func scan(t testing.TB, p *uffd.Pagemap, r uffd.Range, q uffd.PageQuery, room int) (all []uffd.PageRegion) {
	t.Helper()
	regions := make([]uffd.PageRegion, room)
	for rest := r; rest.Len > 0; {
		n, next, err := p.Scan(rest, q, regions)
		if err != nil {
			t.Fatal(err)
		}
		if next.End() != r.End() || next.Start <= rest.Start || n < room && next.Len > 0 {
			t.Fatalf("of %v in %d regions, %v is left", rest, n, next)
		}
		for _, found := range regions[:n] {
			last := len(all) - 1
			if last >= 0 && all[last].End == found.Start && all[last].Categories == found.Categories {
				all[last].End = found.End
			} else {
				all = append(all, found)
			}
		}
		rest = next
	}
	return all
}

// pagesOf returns the pages of r that are in regions, counted from 0, each with its reported categories.
func pagesOf(t testing.TB, r uffd.Range, kind uffdtest.Kind, regions []uffd.PageRegion) map[int]uffd.Categories {
	t.Helper()
	pages := map[int]uffd.Categories{}
	for _, found := range regions {
		if found.Start < r.Start || found.End > r.End() || found.Start >= found.End {
			t.Fatalf("region %v of %v", found.Range(), r)
		}
		for at := found.Start - r.Start; at < found.End-r.Start; at += kind.PageSize() {
			pages[int(at/kind.PageSize())] = found.Categories
		}
	}
	return pages
}

// each returns a map of pages that all have the categories c.
func each(c uffd.Categories, pages ...int) map[int]uffd.Categories {
	m := map[int]uffd.Categories{}
	for _, page := range pages {
		m[page] = c
	}
	return m
}

// TestScanPresent checks that a scan of another process finds exactly the pages that the process has touched, with any
// room for the answer.
func TestScanPresent(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PagePresent|uffd.PageFile|uffd.PageHuge)
	for kind, want := range map[uffdtest.Kind]uffd.Categories{
		uffdtest.Anon:    uffd.PagePresent,
		uffdtest.Shmem:   uffd.PagePresent | uffd.PageFile,
		uffdtest.Hugetlb: uffd.PagePresent | uffd.PageFile | uffd.PageHuge,
	} {
		t.Run(kind.String(), func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			if kind == uffdtest.Hugetlb {
				uffdtest.ReserveHugePages(t, 8)
			}
			c := uffdtest.Start(t)
			p := openPagemap(t, c.Pid)
			r := c.Map(kind, 8)
			for _, page := range []uint64{1, 2, 5, 7} {
				c.Do(uffdtest.Write(r.Start+page*kind.PageSize(), page))
			}
			present := uffd.PageQuery{All: uffd.PagePresent, Return: uffd.PagePresent | uffd.PageFile | uffd.PageHuge}
			for room := 1; room < 5; room++ {
				got := pagesOf(t, r, kind, scan(t, p, r, present, room))
				if diff := cmp.Diff(each(want, 1, 2, 5, 7), got); diff != "" {
					t.Errorf("with room for %d (-want +got):\n%s", room, diff)
				}
			}

			absent := uffd.PageQuery{All: uffd.PagePresent, Inverted: uffd.PagePresent, Return: uffd.PagePresent}
			if diff := cmp.Diff(each(0, 0, 3, 4, 6), pagesOf(t, r, kind, scan(t, p, r, absent, 9))); diff != "" {
				t.Errorf("those that are not there (-want +got):\n%s", diff)
			}
			neither := uffd.PageQuery{Any: uffd.PageSwapped | uffd.PagePFNZero}
			if got := scan(t, p, r, neither, 9); got != nil {
				t.Errorf("swapped, or of zeros: %v", got)
			}
			either := uffd.PageQuery{Any: uffd.PageSwapped | uffd.PagePresent}
			if diff := cmp.Diff(each(0, 1, 2, 5, 7), pagesOf(t, r, kind, scan(t, p, r, either, 9))); diff != "" {
				t.Errorf("swapped, or there (-want +got):\n%s", diff)
			}

			if kind == uffdtest.Anon { // on a read, the kernel maps its page of zeros
				c.Do(uffdtest.Discard(r))
				c.Do(uffdtest.Read(r.Start + 3*4096))
				if diff := cmp.Diff(each(0, 3), pagesOf(t, r, kind, scan(t, p, r, neither, 9))); diff != "" {
					t.Errorf("of zeros (-want +got):\n%s", diff)
				}
			}
			c.Do(uffdtest.Unmap(r))
			if got := scan(t, p, r, uffd.PageQuery{}, 9); got != nil {
				t.Errorf("where nothing is mapped: %v", got)
			}
		})
	}
}

// TestScanManyRegions scans more than 512 regions. The kernel writes regions out 512 at a time, and does not always set
// walk_end to the end.
func TestScanManyRegions(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PagePresent)
	const regions = 1100
	c := uffdtest.Start(t)
	p := openPagemap(t, c.Pid)
	r := c.Map(uffdtest.Shmem, 2*regions+100)
	want := map[int]uffd.Categories{}
	for page := 0; page < 2*regions; page += 2 {
		c.Do(uffdtest.Write(r.Start+uint64(page)*4096, 1))
		want[page] = uffd.PagePresent
	}
	q := uffd.PageQuery{All: uffd.PagePresent, Return: uffd.PagePresent}
	for _, room := range []int{1, 511, 512, 513, 600, 1024, regions - 1, regions, regions + 1, 4096} {
		found := scan(t, p, r, q, room)
		if diff := cmp.Diff(want, pagesOf(t, r, uffdtest.Shmem, found)); diff != "" || len(found) != regions {
			t.Errorf("with room for %d: %d regions (-want +got):\n%s", room, len(found), diff)
		}
	}
}

// TestScanSelf scans the memory of this process.
func TestScanSelf(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PagePresent)
	const pages = 16
	m, err := unix.Mmap(-1, 0, pages*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	r := uffd.Range{Start: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m)))), Len: pages * 4096}
	for _, page := range []int{0, 9, pages - 1} {
		m[page*4096] = 1
	}
	q := uffd.PageQuery{All: uffd.PagePresent, Return: uffd.PagePresent}
	got := pagesOf(t, r, uffdtest.Anon, scan(t, openPagemap(t, os.Getpid()), r, q, pages))
	if diff := cmp.Diff(each(uffd.PagePresent, 0, 9, pages-1), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestScanWritten checks that the kernel records writes itself, and that one scan reports the written pages and
// protects them again.
func TestScanWritten(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PageWritten|uffd.PageWPAllowed)
	uffdtest.Need(t, uffd.FeatureWPAsync)
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem, uffdtest.Hugetlb} {
		t.Run(kind.String(), func(t *testing.T) {
			if kind == uffdtest.Hugetlb {
				uffdtest.ReserveHugePages(t, 8)
			}
			c := uffdtest.Start(t)
			u := c.Supervise(uffd.FeatureWPAsync)
			p := openPagemap(t, c.Pid)
			r := c.Map(kind, 8)
			q := uffd.PageQuery{All: uffd.PageWritten, Return: uffd.PageWritten | uffd.PageWPAllowed,
				Mode: uffd.ScanProtect | uffd.ScanCheckWPAsync}
			regions := make([]uffd.PageRegion, 9)
			if n, rest, err := p.Scan(r, q, regions); !errors.Is(err, uffd.ErrPermission) || n != 0 || rest != r {
				t.Errorf("not registered: %d, %v, %v", n, rest, err)
			}
			for page := range uint64(8) {
				c.Do(uffdtest.Write(r.Start+page*kind.PageSize(), page))
			}
			if _, err := u.Register(r, uffd.ModeWP); err != nil {
				t.Fatal(err)
			}
			const want = uffd.PageWritten | uffd.PageWPAllowed
			for _, written := range [][]int{{0, 1, 2, 3, 4, 5, 6, 7}, nil, {3, 4, 6}, {0}, nil} {
				if len(written) < 8 {
					for _, page := range written {
						c.Do(uffdtest.Write(r.Start+uint64(page)*kind.PageSize(), 9))
					}
					c.Do(uffdtest.Read(r.Start + 5*kind.PageSize())) // a read does not count
				}
				if diff := cmp.Diff(each(want, written...), pagesOf(t, r, kind, scan(t, p, r, q, 2))); diff != "" {
					t.Errorf("written to %d (-want +got):\n%s", written, diff)
				}
			}
			events := uffd.NewEventBuffer(1)
			if _, err := u.Read(events); !errors.Is(err, uffd.ErrWouldBlock) {
				t.Errorf("a message came: %v, %v", events.At(0).Kind, err)
			}
			if kind == uffdtest.Hugetlb {
				c.Do(uffdtest.Write(r.Start, 9))
				part := uffd.Range{Start: r.Start, Len: 4096}
				if n, rest, err := p.Scan(part, q, regions); !errors.Is(err, uffd.ErrInvalid) || n != 0 || rest != part {
					t.Errorf("a part of a huge page: %d, %v, %v", n, rest, err)
				}
			}
		})
	}
}

func TestScanErrors(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PagePresent)
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	p := openPagemap(t, c.Pid)
	r := c.Map(uffdtest.Shmem, 2)
	c.Do(uffdtest.Write(r.Start, 1))
	q := uffd.PageQuery{All: uffd.PagePresent}
	regions := make([]uffd.PageRegion, 2)
	for name, tt := range map[string]struct {
		r       uffd.Range
		q       uffd.PageQuery
		regions []uffd.PageRegion
		want    error
	}{
		"misaligned":       {uffd.Range{Start: r.Start + 1, Len: r.Len}, q, regions, uffd.ErrInvalid},
		"no room":          {r, q, nil, uffd.ErrInvalid},
		"unknown mode":     {r, uffd.PageQuery{Mode: 1 << 40}, regions, uffd.ErrInvalid},
		"unknown category": {r, uffd.PageQuery{Any: 1 << 40}, regions, uffd.ErrNotSupported},
		"not the user's":   {uffd.Range{Start: 1 << 63, Len: 4096}, q, regions, uffd.ErrFault},
	} {
		n, rest, err := p.Scan(tt.r, tt.q, tt.regions)
		if !errors.Is(err, tt.want) || n != 0 || rest != tt.r {
			t.Errorf("%s: %d, %v, %v, want %v", name, n, rest, err, tt.want)
		}
	}
	if n, rest, err := p.Scan(uffd.Range{Start: r.Start}, q, regions); n != 0 || rest.Len != 0 || err != nil {
		t.Errorf("an empty range: %d, %v, %v", n, rest, err)
	}

	// Some kernels report memory that is gone as empty.
	c.Kill()
	if n, _, err := p.Scan(r, q, regions); n != 0 || err != nil && !errors.Is(err, uffd.ErrProcessGone) {
		t.Errorf("the process is gone: %d, %v", n, err)
	}
	if _, err := uffd.OpenPagemap(c.Pid); !errors.Is(err, uffd.ErrProcessGone) {
		t.Errorf("open the pagemap of a process that is gone: %v", err)
	}
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	if n, rest, err := p.Scan(r, q, regions); n != 0 || rest != r || !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %d, %v, %v", n, rest, err)
	}
}

// TestScanDoesNotAllocate checks that Scan does not allocate, however many regions it finds.
func TestScanDoesNotAllocate(t *testing.T) {
	uffdtest.NeedCategories(t, uffd.PagePresent)
	c := uffdtest.Start(t)
	p := openPagemap(t, c.Pid)
	r := c.Map(uffdtest.Shmem, 64)
	for page := uint64(0); page < 64; page += 2 {
		if v := c.Do(uffdtest.Write(r.Start+page*4096, 1)); v.Errno != 0 {
			t.Fatal(v)
		}
	}
	q := uffd.PageQuery{All: uffd.PagePresent, Return: uffd.PagePresent}
	regions := make([]uffd.PageRegion, 5)
	found := 0
	allocations := testing.AllocsPerRun(50, func() {
		found = 0
		for rest := r; rest.Len > 0; {
			var err error
			var n int
			if n, rest, err = p.Scan(rest, q, regions); err != nil {
				t.Error(err)
				return
			}
			found += n
		}
	})
	if allocations != 0 || found != 32 {
		t.Errorf("%v allocations, %d regions found, want 0, 32", allocations, found)
	}
}

// TestCategoriesOfThisKernel checks the answer of the probe against scans.
func TestCategoriesOfThisKernel(t *testing.T) {
	have, err := uffd.ProbeCategories()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the kernel has %v", have)
	p := openPagemap(t, os.Getpid())
	regions := make([]uffd.PageRegion, 1)
	for bit := range 64 {
		c := uffd.Categories(1) << bit
		_, _, err := p.Scan(uffd.Range{Len: 4096}, uffd.PageQuery{Any: c}, regions)
		if have&c != 0 && err != nil || have&c == 0 && !errors.Is(err, uffd.ErrNotSupported) {
			t.Errorf("%v, of %v: %v", c, have, err)
		}
	}
	var missing *uffd.NotSupportedError
	if err := uffd.HaveCategories(uffd.PagePresent | 1<<40); !errors.As(err, &missing) || missing.MinKernel != "" {
		t.Errorf("a category that no kernel has: %v", err)
	}
}
