// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/internal/pagelane"
	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagesrv/pagemap"
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

// patience bounds every wait, so that what never comes fails a test.
const patience = 20 * time.Second

// isZero says which pages of the source are zero.
func isZero(block int, page uint64) bool { return (page+uint64(block))%8 == 3 }

// fill makes the content of a source page: every word tells where it belongs.
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

// target is a process whose memory is filled, and the engine that fills it.
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
	own   bool // a userfaultfd of its own, not that of the blocks before
	// unknown: the engine does not have its file, as of private memory.
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
		uffdtest.ReserveHugePages(t, 2*huge) // the source has its own
	}
	c := uffdtest.Start(t)
	var err error
	u := c.NewUFFD(uffd.OpenSyscall)
	for i, b := range l {
		if b.own {
			u = c.NewUFFD(uffd.OpenSyscall)
		}
		r := c.Map(b.kind, b.pages)
		block := Block{ID: fmt.Sprint("ram", i), Addr: r.Start, Size: r.Len, PageSize: b.kind.PageSize(), UFFD: u}
		if b.kind != uffdtest.Anon && !b.unknown {
			block.File = fileOf(t, c.Pid, r)
		}
		o.Blocks = append(o.Blocks, block)
	}
	if o.Pagemap, err = pagemap.Open(c.Pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Pagemap.Close() })
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
		cannot.Run(t, "%v", err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// word reads a word of the process' memory as a thread of it does.
func (g *target) read(block int, page, offset uint64) uffdtest.Pending {
	b := &g.blocks[block]
	return g.child.Go(uffdtest.Read(b.Addr + page*b.PageSize + offset))
}

// verify compares all memory; the engine is done.
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

// run starts Run; the result comes on the channel.
func (g *target) run(ctx context.Context, l lanes) <-chan error {
	g.t.Helper()
	result := make(chan error, 1)
	go func() { result <- g.Run(ctx, l.demand, l.bulk) }()
	return result
}

// await is the next value of a channel, within a deadline.
func await[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("no %s within %v", what, patience)
	}
	return v
}

// until polls for a condition within a deadline.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not %s within %v", what, patience)
		}
	}
}

type lanes struct {
	demand []Lane
	bulk   Lane
	cancel context.CancelFunc
}

// serve serves lanes on the loopback and returns its address.
func serve(t testing.TB, handle func(*pagelane.Stream) error) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lanes := pagelane.NewServer(handle)
	server := grpc.NewServer(grpc.Creds(lanes.Credentials(insecure.NewCredentials())))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		lanes.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// dial opens the demand lanes, then the bulk lane, each on its own connection.
func dial(t testing.TB, address string, demand int) lanes {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := lanes{cancel: cancel}
	t.Cleanup(cancel)
	for i := range demand + 1 {
		md := metadata.Pairs(pagewire.MigrationIDKey, "m", pagewire.MigrationTokenKey, "secret", pagewire.CompressionKey, pagewire.Unpackable)
		if i == demand {
			md.Set(pagewire.LaneKey, pagewire.BulkLane)
		}
		conn, err := pagelane.Dial(ctx, address, insecure.NewCredentials())
		if err != nil {
			t.Fatal(err)
		}
		lane, err := pagelane.Open(ctx, conn, md)
		if err != nil {
			t.Fatal(err)
		}
		if l.bulk = lane; i < demand {
			l.demand = append(l.demand, lane)
		}
	}
	return l
}

// realSource offers RAM of that layout with the page server of the source host.
func realSource(t testing.TB, l layout) string {
	t.Helper()
	var blocks []pagesrv.Block
	for i, b := range l {
		flags := unix.MFD_CLOEXEC
		if b.kind == uffdtest.Hugetlb {
			flags |= unix.MFD_HUGETLB
		}
		fd, err := unix.MemfdCreate("source", flags)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		size := b.kind.PageSize()
		if err := unix.Ftruncate(fd, int64(size*b.pages)); err != nil {
			t.Fatal(err)
		}
		memory, err := unix.Mmap(fd, 0, int(size*b.pages), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		for p := range b.pages {
			if !isZero(i, p) || p%3 == 0 { // some zero pages are holes, some are written
				fill(memory[p*size:(p+1)*size], i, p)
			}
		}
		if err := unix.Munmap(memory); err != nil {
			t.Fatal(err)
		}
		blocks = append(blocks, pagesrv.Block{ID: fmt.Sprint("ram", i), Path: fmt.Sprintf("/proc/self/fd/%d", fd), Size: size * b.pages, PageSize: unit(size)})
	}
	ram, err := pagesrv.OpenRAM(blocks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ram.Close() })
	server := pagesrv.NewServer()
	export, err := server.Offer("m", "secret", ram, func(context.Context) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(export.Withdraw)
	return serve(t, func(s *pagelane.Stream) error { return server.ServeLane(s) })
}

// script is a source whose answers a test gives by hand.
type script struct {
	lanes  chan *scriptedLane // in the order in which they open
	silent <-chan struct{}    // not nil: do not end a lane that its client has ended before it is closed
}

type scriptedLane struct {
	stream   *pagelane.Stream
	requests chan pagewire.Range // what was asked for, range by range
	end      chan error          // ends the lane
}

func (s *script) serve(stream *pagelane.Stream) error {
	l := &scriptedLane{stream: stream, requests: make(chan pagewire.Range, 1<<16), end: make(chan error, 1)}
	s.lanes <- l // before the header, after which the client opens the next one
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() {
		var r pagewire.Request
		for {
			if err := stream.RecvMsg(&r); err != nil {
				if errors.Is(err, io.EOF) {
					if s.silent != nil {
						<-s.silent
					}
					err = nil
				}
				received <- err
				return
			}
			for _, g := range r.Ranges {
				l.requests <- g
			}
		}
	}()
	select {
	case err := <-received:
		return err
	case err := <-l.end:
		return err
	}
}

// scripted serves a script over demand lanes and a bulk lane.
func scripted(t testing.TB, demand int) (lanes, []*scriptedLane) {
	t.Helper()
	s := &script{lanes: make(chan *scriptedLane, demand+1)}
	l := dial(t, serve(t, s.serve), demand)
	var theirs []*scriptedLane
	for range demand + 1 {
		theirs = append(theirs, await(t, "lane", s.lanes))
	}
	return l, theirs
}

// send answers with these runs, with the right content.
func (l *scriptedLane) send(t testing.TB, pageSize uint64, runs ...pagewire.Run) {
	t.Helper()
	r := pagewire.Reply{Runs: runs}
	for _, run := range runs {
		for o := uint64(0); o < uint64(run.Length) && !run.Zero; o += pageSize {
			page := make([]byte, pageSize)
			fill(page, int(run.Block), (run.Offset+o)/pageSize)
			r.Data = append(r.Data, page...)
		}
	}
	if err := l.stream.SendMsg(&r); err != nil {
		t.Fatal(err)
	}
}

// asked waits for the next range asked for on the lane.
func (l *scriptedLane) asked(t testing.TB) pagewire.Range {
	t.Helper()
	return await(t, "request", l.requests)
}

// answer waits for a range to be asked for and answers it rightly.
func (l *scriptedLane) answer(t testing.TB, pageSize uint64) {
	t.Helper()
	r := l.asked(t)
	for o := uint64(0); o < uint64(r.Length); o += pageSize {
		page := (r.Offset + o) / pageSize
		l.send(t, pageSize, pagewire.Run{Block: r.Block, Offset: r.Offset + o, Length: uint32(pageSize), Zero: isZero(int(r.Block), page)})
	}
}

// parking stops the first goroutine that comes to a point with a page.
type parking struct {
	t              testing.TB
	reached, leave chan struct{}
}

// parkAt is to be called before Run, once for each point.
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
