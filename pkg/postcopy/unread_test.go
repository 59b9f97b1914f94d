// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// unreadable is a source's memory of which some pages cannot be read.
type unreadable struct {
	t      *testing.T
	memory []byte
}

func newUnreadable(t *testing.T, pages uint64) *unreadable {
	t.Helper()
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	memory, err := unix.Mmap(-1, 0, int(pages*pageSize), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(memory) })
	for p := range pages {
		fill(memory[p*pageSize:(p+1)*pageSize], 0, p)
	}
	return &unreadable{t, memory}
}

// remap maps something else in place of a page.
func (u *unreadable) remap(page uint64, flags, fd int) {
	u.t.Helper()
	at := uintptr(unsafe.Pointer(&u.memory[page*pageSize]))
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, at, pageSize, unix.PROT_READ|unix.PROT_WRITE,
		uintptr(unix.MAP_PRIVATE|unix.MAP_FIXED|flags), uintptr(fd), 0); errno != 0 {
		u.t.Fatal(errno)
	}
}

// spoil makes reads of a page fail as those of broken memory do: its file is too short.
func (u *unreadable) spoil(page uint64) {
	u.t.Helper()
	empty, err := unix.MemfdCreate("empty", unix.MFD_CLOEXEC)
	if err != nil {
		u.t.Fatal(err)
	}
	defer unix.Close(empty)
	u.remap(page, 0, empty)
}

func (u *unreadable) mend(page uint64) {
	u.t.Helper()
	u.remap(page, unix.MAP_ANONYMOUS, -1)
	fill(u.memory[page*pageSize:(page+1)*pageSize], 0, page)
}

// TestUnreadablePages: pages that the source cannot read, of memory that cannot be lost, keep no other page from
// coming. Each ends two sessions at most until all others are in. When they can be read, they come.
func TestUnreadablePages(t *testing.T) {
	const pages = 2048
	bad := []uint64{1, 700, 701}
	source := newUnreadable(t, pages)
	for _, p := range bad {
		source.spoil(p)
	}
	address, _ := offer(t, pagesrv.Block{
		ID: "ram0", PID: os.Getpid(), Addr: uint64(uintptr(unsafe.Pointer(&source.memory[0]))),
		Size: pages * pageSize, PageSize: pageSize,
	})
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, Options{Workers: 1})
	g.blocks[0].First = true // its pages come before all others, but not before those that can be read
	g.StartSweep()
	for sessions := 0; g.Stats().PagesPresent < pages-uint64(len(bad)); sessions++ {
		if sessions > 2*len(bad) {
			t.Fatalf("%d of %d pages came in %d sessions", g.Stats().PagesPresent, pages, sessions)
		}
		err := await(t, "end of Run", g.run(context.Background(), dial(t, address, 1)))
		if !errors.Is(err, ErrLaneLost) || status.Code(err) != codes.DataLoss ||
			!strings.Contains(err.Error(), "block ram0") {
			t.Fatalf("Run: %v, want ErrLaneLost, and the page that cannot be read", err)
		}
	}
	for _, p := range bad {
		if s := g.pages.get(p); s == present || s == zero {
			t.Errorf("page %d, which cannot be read, is in state %d", p, s)
		}
		source.mend(p)
	}
	mustEnd(t, g.run(context.Background(), dial(t, address, 1)))
	g.verify()
}
