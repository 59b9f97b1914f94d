// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// defaultCells is how many cells a memory map has if the caller does not say.
	defaultCells = 1024
	// finalCells is how many cells the map has that is kept after the migration.
	finalCells = 1024
	// mapMaxAge is how old a map may be: the page table is read at most twice a second, however many callers there
	// are. A map may also be mapAgeShare times as old as it took to make: some seconds for a VM of a TiB.
	mapMaxAge   = 500 * time.Millisecond
	mapAgeShare = 50
	// askIncomingTimeout bounds a destination's answer.
	askIncomingTimeout = 2 * time.Second
)

// errNoMemoryYet says that a destination has no memory to show.
var errNoMemoryYet = errors.New(
	"the destination has prepared no memory for the VM, or the migration ended before that")

// cachedMap is the last map of a destination's memory. Callers renew it; fault workers have no part in it.
type cachedMap struct {
	at   time.Time
	took time.Duration
	maps []postcopy.BlockMap // nil: none was made yet
}

// memory returns the map of the VM's memory; after the end, the last one. The caller holds limitMu.
func (d *Destination) memory() []postcopy.BlockMap {
	engine := d.engines.last()
	if engine == nil || d.released {
		return d.cachedMap.maps
	}
	fresh := max(mapMaxAge, mapAgeShare*d.cachedMap.took)
	if view, _ := d.Snapshot(); time.Since(d.cachedMap.at) >= fresh || Terminal(view.GetState()) {
		began := time.Now()
		maps := engine.Map()
		d.cachedMap = cachedMap{began, time.Since(began), maps}
	}
	return d.cachedMap.maps
}

// keepMemory makes the last map before the engine's states are released. The caller holds limitMu.
func (d *Destination) keepMemory() {
	d.cachedMap.at = time.Time{}
	if made := d.memory(); made != nil {
		d.cachedMap.maps = postcopy.Coarser(made, finalCells)
	}
}

// Incoming returns how the VM's memory arrives here, with a memory map of at most cells cells. 0: defaultCells.
func (d *Destination) Incoming(cells uint32) (*migratedv1.Incoming, error) {
	d.limitMu.Lock()
	made := d.memory()
	d.limitMu.Unlock()
	if made == nil {
		return nil, errNoMemoryYet
	}
	r := d.Report()
	m := r.GetMigration()
	return &migratedv1.Incoming{
		State: m.GetState(), Location: m.GetLocation(), Error: m.GetError(), Progress: m.GetProgress(),
		Pages: r.GetIncoming(), Timeline: r.GetTimeline(), Memory: shownMemory(made, cells), Time: r.GetTime(),
	}, nil
}

// shownMemory returns maps as the API shows them.
func shownMemory(made []postcopy.BlockMap, cells uint32) *migratedv1.MemoryMap {
	if cells == 0 {
		cells = defaultCells
	}
	shown := &migratedv1.MemoryMap{}
	for _, m := range postcopy.Coarser(made, int(min(cells, postcopy.MostCells))) {
		b := &migratedv1.MemoryBlock{
			Id: printable.Line(m.ID), Size: m.Size, PageSize: m.PageSize, PagesPerCell: m.CellPages,
		}
		for _, c := range m.Cells {
			b.Missing = append(b.Missing, c.Missing)
			b.InFlight = append(b.InFlight, c.Asked)
			b.WaitedFor = append(b.WaitedFor, c.Waited)
			b.Present = append(b.Present, c.Present)
			b.Zero = append(b.Zero, c.Zero)
			b.Faulted = append(b.Faulted, c.Faulted)
		}
		shown.Blocks = append(shown.Blocks, b)
	}
	return shown
}

// checkMemory refuses a malformed or oversized map. Maps come from another host.
func checkMemory(m *migratedv1.MemoryMap) error {
	cells := 0
	for _, b := range m.GetBlocks() {
		n := len(b.GetMissing())
		for _, list := range [][]uint32{
			b.GetInFlight(), b.GetWaitedFor(), b.GetPresent(), b.GetZero(), b.GetFaulted(),
		} {
			if len(list) != n {
				return fmt.Errorf("a map of memory with %d cells, and %d", n, len(list))
			}
		}
		cells += n
	}
	if most := postcopy.MostCells; cells > most || len(m.GetBlocks()) > most {
		return fmt.Errorf("a map of memory with %d blocks and %d cells", len(m.GetBlocks()), cells)
	}
	return nil
}

// heard is what the destination last told this source of the VM's memory there.
type heard struct {
	// conn is the connection to the destination, which may be replaced. nil: there is none. It is atomic, so that
	// callers of Incoming never delay the migration.
	conn atomic.Pointer[grpc.ClientConn]

	mu   sync.Mutex // held while the destination is asked; guards at and last
	at   time.Time
	last *migratedv1.Incoming
}

// Incoming asks the destination how the VM's memory arrives, at most twice a second. After the migration it returns
// the destination's last word.
func (s *Source) Incoming(ctx context.Context, cells uint32) (*migratedv1.Incoming, error) {
	view, _ := s.Snapshot()
	s.lastIncoming.mu.Lock()
	defer s.lastIncoming.mu.Unlock()
	switch {
	case Terminal(view.GetState()):
		if s.lastIncoming.last == nil {
			return nil, errNoMemoryYet
		}
	case !view.GetPrepared() || s.lastIncoming.conn.Load() == nil:
		return nil, errNotPrepared
	case time.Since(s.lastIncoming.at) >= mapMaxAge:
		if err := s.askIncoming(ctx); err != nil {
			return nil, err
		}
	}
	answer := proto.CloneOf(s.lastIncoming.last)
	answer.Memory = coarser(answer.GetMemory(), cells)
	return answer, nil
}

func (s *Source) askIncoming(ctx context.Context) error {
	conn := s.lastIncoming.conn.Load()
	if conn == nil { // it was just closed
		return errNotPrepared
	}
	ctx, cancel := context.WithTimeout(ctx, askIncomingTimeout)
	defer cancel()
	answer, err := migratedv1.NewPeerServiceClient(conn).ShowIncoming(ctx,
		&migratedv1.ShowIncomingRequest{Id: s.cfg.ID, Cells: postcopy.MostCells})
	if err == nil {
		if broken := checkMemory(answer.GetIncoming().GetMemory()); broken != nil {
			err = status.Error(codes.Internal, broken.Error())
		}
	}
	if err != nil {
		return fromPeer("ask how the VM's memory comes", s.cfg.Spec.GetDestination(), err)
	}
	s.lastIncoming.at, s.lastIncoming.last = time.Now(), answer.GetIncoming()
	if s.lastIncoming.last == nil {
		s.lastIncoming.last = &migratedv1.Incoming{}
	}
	printable.Message(s.lastIncoming.last)
	return nil
}

// keepLastIncoming keeps what the destination says when the migration is over there.
func (s *Source) keepLastIncoming(answer *migratedv1.WatchIncomingResponse) {
	if !Terminal(answer.GetState()) || answer.GetMemory() == nil || checkMemory(answer.GetMemory()) != nil {
		return
	}
	last := &migratedv1.Incoming{
		State: answer.GetState(), Location: answer.GetLocation(), Error: answer.GetError(),
		Progress: answer.GetProgress(), Pages: answer.GetIncoming(), Timeline: answer.GetTimeline(),
		Memory: answer.GetMemory(), Time: timestamppb.Now(),
	}
	printable.Message(last)
	s.lastIncoming.mu.Lock()
	defer s.lastIncoming.mu.Unlock()
	s.lastIncoming.at, s.lastIncoming.last = time.Now(), last
}

// coarser returns the map with at most cells cells.
func coarser(m *migratedv1.MemoryMap, cells uint32) *migratedv1.MemoryMap {
	var made []postcopy.BlockMap
	for _, b := range m.GetBlocks() {
		block := postcopy.BlockMap{
			ID: b.GetId(), Size: b.GetSize(), PageSize: b.GetPageSize(), CellPages: b.GetPagesPerCell(),
		}
		for i := range b.GetMissing() {
			block.Cells = append(block.Cells, postcopy.Cell{
				Missing: b.GetMissing()[i], Asked: b.GetInFlight()[i], Waited: b.GetWaitedFor()[i],
				Present: b.GetPresent()[i], Zero: b.GetZero()[i], Faulted: b.GetFaulted()[i],
			})
		}
		made = append(made, block)
	}
	return shownMemory(made, cells)
}
