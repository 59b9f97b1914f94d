// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

type lanes struct {
	demand []Lane
	bulk   Lane
	cancel context.CancelFunc
	script *script                             // if scripted made them
	open   func(context.Context) (Lane, error) // opens another bulk lane
	more   func(context.Context) (Lane, error) // passed to Run
}

// processors gives Go's runtime a processor for each goroutine that sleeps in system calls, as a daemon does.
func processors(n int) {
	granting.Lock()
	defer granting.Unlock()
	if sleepers += n; sleepers > granted {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + sleepers - granted)
		granted = sleepers
	}
}

var (
	granting          sync.Mutex
	sleepers, granted int
)

// serve serves lanes on the loopback and returns its address.
func serve(t testing.TB, handle func(*pagelane.Stream) error) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lanes := pagelane.NewServer(handle, processors)
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

// dial opens the demand lanes and then the bulk lane, each on a connection of its own.
func dial(t testing.TB, address string, demand int) lanes {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := lanes{cancel: cancel}
	t.Cleanup(cancel)
	open := func(bulk bool) (Lane, error) {
		call := pagewire.Call{ID: "m", Token: "secret", Bulk: bulk, Packed: true}
		conn, err := pagelane.Dial(ctx, address, insecure.NewCredentials(), processors)
		if err != nil {
			return nil, err
		}
		return pagelane.Open(ctx, conn, call.Metadata())
	}
	for i := range demand + 1 {
		lane, err := open(i == demand)
		if err != nil {
			t.Fatal(err)
		}
		if l.bulk = lane; i < demand {
			l.demand = append(l.demand, lane)
		}
	}
	l.open = func(context.Context) (Lane, error) { return open(true) }
	return l
}

// realSource serves RAM of that layout with the page server of the source host.
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
			if !isZero(i, p) || p%3 == 0 { // some zero pages are holes, and some are written
				fill(memory[p*size:(p+1)*size], i, p)
			}
		}
		if err := unix.Munmap(memory); err != nil {
			t.Fatal(err)
		}
		blocks = append(blocks, pagesrv.Block{
			ID: fmt.Sprint("ram", i), Path: fmt.Sprintf("/proc/self/fd/%d", fd), Size: size * b.pages, PageSize: unit(size),
		})
	}
	address, _ := offer(t, blocks...)
	return address
}

// offer serves the pages of blocks, and returns its address.
func offer(t testing.TB, blocks ...pagesrv.Block) (address string, export *pagesrv.Export) {
	t.Helper()
	ram, err := pagesrv.OpenRAM(blocks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ram.Close() })
	server := pagesrv.NewServer(pagesrv.Options{})
	export, err = server.Offer("m", "secret", ram, func(context.Context) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(export.Withdraw)
	return serve(t, func(s *pagelane.Stream) error { return server.ServeLane(s) }), export
}

// script is a source that a test plays.
type script struct {
	lanes  chan *scriptedLane // in the order in which they were opened
	silent <-chan struct{}    // if not nil, lanes stay open until it is closed, also those that their client has ended
}

type scriptedLane struct {
	stream   *pagelane.Stream
	requests chan pagewire.Range // the ranges of all requests, one by one
	end      chan error          // ends the lane
}

func (s *script) serve(stream *pagelane.Stream) error {
	l := &scriptedLane{stream: stream, requests: make(chan pagewire.Range, 1<<16), end: make(chan error, 1)}
	s.lanes <- l // before the client gets the header and opens the next lane
	if err := stream.Accept(); err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() {
		var r pagewire.Request
		for {
			if err := stream.Recv(&r); err != nil {
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
	s := &script{lanes: make(chan *scriptedLane, demand+1+mostBulkLanes)}
	l := dial(t, serve(t, s.serve), demand)
	l.script = s
	var theirs []*scriptedLane
	for range demand + 1 {
		theirs = append(theirs, await(t, "lane", s.lanes))
	}
	return l, theirs
}

// send answers with these runs and the right content.
func (l *scriptedLane) send(t testing.TB, pageSize uint64, runs ...pagewire.Run) {
	t.Helper()
	r := pagewire.Reply{Runs: runs}
	for _, run := range runs {
		for o := uint64(0); o < uint64(run.Length) && run.Carries(); o += pageSize {
			page := make([]byte, pageSize)
			fill(page, int(run.Block), (run.Offset+o)/pageSize)
			r.Data = append(r.Data, page...)
		}
	}
	if err := l.stream.Send(&r); err != nil {
		t.Fatal(err)
	}
}

// asked waits for the next range that is requested on the lane.
func (l *scriptedLane) asked(t testing.TB) pagewire.Range {
	t.Helper()
	return await(t, "request", l.requests)
}

// answer waits for the next range, and answers it.
func (l *scriptedLane) answer(t testing.TB, pageSize uint64) {
	t.Helper()
	r := l.asked(t)
	for o := uint64(0); o < uint64(r.Length); o += pageSize {
		page := (r.Offset + o) / pageSize
		l.send(t, pageSize, pagewire.Run{
			Block: r.Block, Offset: r.Offset + o, Length: uint32(pageSize), Zero: isZero(int(r.Block), page),
		})
	}
}
