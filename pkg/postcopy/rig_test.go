// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

func TestMain(m *testing.M) {
	if arguments := os.Getenv(copierEnv); arguments != "" {
		if err := copier(arguments); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// patience is the longest that a test waits for anything.
const patience = 2 * time.Minute

// isZero says which pages of the source are zero.
func isZero(block int, page uint64) bool { return (page+uint64(block))%8 == 3 }

// fill makes the content of a page of the source. Each word depends on its place.
func fill(dst []byte, block int, page uint64) {
	if isZero(block, page) {
		clear(dst)
		return
	}
	for i := 0; i < len(dst); i += 8 {
		binary.NativeEndian.PutUint64(dst[i:], word(block, page, uint64(i)))
	}
}

func word(block int, page, offset uint64) uint64 {
	if isZero(block, page) {
		return 0
	}
	return (page<<20|offset|uint64(block)<<60)*0x9E3779B97F4A7C15 | 1
}

// target is a process whose memory is filled, with its engine.
type target struct {
	*Engine
	t     testing.TB
	child *uffdtest.Child
	uffd  *uffd.UFFD
}

// layout is the RAM of a test's VM.
type layout []ram

type ram struct {
	kind  uffdtest.Kind
	pages uint64
	own   bool // has a userfaultfd of its own, not that of the blocks before it
	// unknown says that the engine does not have the file, as with private memory.
	unknown bool
}

func newTarget(t testing.TB, l layout, o Options) *target {
	t.Helper()
	huge := 0
	for _, b := range l {
		if b.kind == uffdtest.Hugetlb {
			huge += int(b.pages)
		}
	}
	if huge > 0 {
		uffdtest.ReserveHugePages(t, 2*huge) // the source needs as many
	}
	c := uffdtest.Start(t)
	var err error
	u := c.NewUFFD(uffd.OpenSyscall)
	for i, b := range l {
		if b.own {
			u = c.NewUFFD(uffd.OpenSyscall)
		}
		r := c.Map(b.kind, b.pages)
		block := Block{
			ID: fmt.Sprint("ram", i), Addr: r.Start, Size: r.Len, PageSize: b.kind.PageSize(),
			UFFD: u, Private: b.kind == uffdtest.Anon,
		}
		if b.kind != uffdtest.Anon && !b.unknown {
			block.File = fileOf(t, c.Pid, r)
		}
		o.Blocks = append(o.Blocks, block)
	}
	if o.Pagemap, err = uffd.OpenPagemap(c.Pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Pagemap.Close() })
	if o.Sleeps == nil {
		o.Sleeps = processors
	}
	e, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return &target{Engine: e, t: t, child: c, uffd: u}
}

// fileOf opens the file that a process has mapped there.
func fileOf(t testing.TB, pid int, r uffd.Range) *os.File {
	t.Helper()
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, r.Start, r.Start+r.Len), os.O_RDWR, 0)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// word reads a word of memory in a thread of the process.
func (g *target) read(block int, page, offset uint64) uffdtest.Pending {
	b := &g.blocks[block]
	return g.child.Go(uffdtest.Read(b.Addr + page*b.PageSize + offset))
}

// verify compares all memory, after Run.
func (g *target) verify() {
	g.t.Helper()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", g.child.Pid))
	if err != nil {
		g.t.Fatal(err)
	}
	defer mem.Close()
	for i := range g.blocks {
		b := &g.blocks[i]
		got, want := make([]byte, b.PageSize), make([]byte, b.PageSize)
		for p := range b.Size / b.PageSize {
			at := p * b.PageSize
			if _, err := mem.ReadAt(got, int64(b.Addr+at)); err != nil {
				g.t.Fatal(err)
			}
			if fill(want, i, p); !bytes.Equal(got, want) {
				g.t.Fatalf("block %d page %d is wrong (state %d): % x…", i, p, g.pages.get(b.first+at>>b.shift), got[:16])
			}
		}
	}
}

// run calls Run in a goroutine. Its result comes on the channel.
func (g *target) run(ctx context.Context, l lanes) <-chan error {
	g.t.Helper()
	result := make(chan error, 1)
	go func() { result <- g.Run(ctx, l.demand, l.bulk, l.more) }()
	return result
}

// await receives a value from a channel, or fails after patience.
func await[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("no %s within %v", what, patience)
	}
	return v
}

// until polls until the condition holds, or fails after patience.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not %s within %v", what, patience)
		}
	}
}

// parking stops the first goroutine that comes to a point with a page.
type parking struct {
	t              testing.TB
	reached, leave chan struct{}
}

// parkAt must be called before Run, at most once for each point.
func (g *target) parkAt(point string, page uint64) *parking {
	p := &parking{g.t, make(chan struct{}), make(chan struct{})}
	var once sync.Once
	others := g.park
	g.park = func(at string, n uint64) {
		if others != nil {
			others(at, n)
		}
		if at == point && n == page {
			once.Do(func() {
				close(p.reached)
				<-p.leave
			})
		}
	}
	g.t.Cleanup(p.unpark)
	return p
}

func (p *parking) await() {
	p.t.Helper()
	await(p.t, "goroutine at the point", p.reached)
}

func (p *parking) unpark() {
	select {
	case <-p.leave:
	default:
		close(p.leave)
	}
}

// allocated returns how many bytes a file takes in its file system.
func allocated(info os.FileInfo) uint64 { return uint64(info.Sys().(*syscall.Stat_t).Blocks) * 512 }

// allocatedPages returns how many pages the file of a target's first block has.
func allocatedPages(t testing.TB, g *target) uint64 {
	t.Helper()
	info, err := g.blocks[0].File.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return allocated(info) / pageSize
}
