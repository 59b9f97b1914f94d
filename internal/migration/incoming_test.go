// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// ShowIncoming answers with what the test has put into the peer.
func (p *peer) ShowIncoming(
	context.Context, *migratedv1.ShowIncomingRequest,
) (*migratedv1.ShowIncomingResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.incoming == nil {
		return nil, status.Error(codes.FailedPrecondition, "there is none")
	}
	return &migratedv1.ShowIncomingResponse{Incoming: &migratedv1.Incoming{Memory: p.incoming}}, nil
}

// mapOf returns a map of one block with the given number of cells. Each cell has two pages: one present, one missing.
func mapOf(cells int) *migratedv1.MemoryMap {
	list := func(n uint32) []uint32 { return slices.Repeat([]uint32{n}, cells) }
	return &migratedv1.MemoryMap{Blocks: []*migratedv1.MemoryBlock{{
		Id: "pc.ram", Size: uint64(cells) * 8192, PageSize: 4096, PagesPerCell: 2,
		Missing: list(1), Present: list(1), InFlight: list(0), WaitedFor: list(0), Zero: list(0), Faulted: list(1),
	}}}
}

// TestMapsOfOthers: an oversized or malformed map of a destination is refused.
func TestMapsOfOthers(t *testing.T) {
	long := mapOf(4)
	long.Blocks[0].Faulted = append(long.Blocks[0].Faulted, 1)
	crowd := &migratedv1.MemoryMap{}
	for range postcopy.MostCells + 1 {
		crowd.Blocks = append(crowd.Blocks, &migratedv1.MemoryBlock{})
	}
	for name, c := range map[string]struct {
		m    *migratedv1.MemoryMap
		good bool
	}{
		"none": {nil, true}, "a map": {mapOf(4), true}, "as many cells as can be": {mapOf(postcopy.MostCells), true},
		"a cell too many":      {mapOf(postcopy.MostCells + 1), false},
		"a list that is short": {short(4), false}, "a list that is long": {long, false},
		"blocks without end": {crowd, false},
	} {
		if err := checkMemory(c.m); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSourceAsksForTheMap: a source passes on what the destination says, as coarse as the caller wants. It says why
// there is nothing, and keeps the last map.
func TestSourceAsksForTheMap(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	for view, changed := s.source.Snapshot(); !view.GetPrepared(); view, changed = s.source.Snapshot() {
		if _, err := s.source.Incoming(t.Context(), 0); !errors.Is(err, errNotPrepared) {
			if view, _ = s.source.Snapshot(); !view.GetPrepared() {
				t.Errorf("before it is prepared: %v", err)
			}
		}
		<-changed
	}
	_, err := s.source.Incoming(t.Context(), 0)
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "there is none") {
		t.Errorf("of a destination that has nothing: %v", err)
	}
	say := func(m *migratedv1.MemoryMap) {
		s.peer.mu.Lock()
		defer s.peer.mu.Unlock()
		s.peer.incoming = m
	}
	say(mapOf(postcopy.MostCells + 1))
	if _, err := s.source.Incoming(t.Context(), 0); status.Code(err) != codes.Internal {
		t.Errorf("of a destination that breaks the protocol: %v", err)
	}
	say(mapOf(1000))
	for want, cells := range map[uint32]uint32{1000: 0, 500: 999, 1: 1} {
		answer, err := s.source.Incoming(t.Context(), cells)
		if err != nil {
			t.Fatal(err)
		}
		b := answer.GetMemory().GetBlocks()[0]
		if len(b.GetMissing()) != int(want) || b.GetPagesPerCell()*uint64(want) < 2000 {
			t.Errorf("of at most %d cells there are %d, of %d pages", cells, len(b.GetMissing()), b.GetPagesPerCell())
		}
		var present, faulted uint32
		for i := range b.GetPresent() {
			present += b.GetPresent()[i]
			faulted += b.GetFaulted()[i]
		}
		if present != 1000 || faulted != 1000 {
			t.Errorf("%d pages are there and %d were waited for, of 1000", present, faulted)
		}
	}
	for _, m := range []*migratedv1.MemoryMap{short(8), mapOf(8)} {
		s.source.keepLastIncoming(&migratedv1.WatchIncomingResponse{
			State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, Memory: m,
		})
	}
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	<-s.source.Done()
	answer, err := s.source.Incoming(t.Context(), 0)
	if err != nil || len(answer.GetMemory().GetBlocks()[0].GetMissing()) != 8 {
		t.Errorf("after the end: %v, %v", answer, err)
	}
}

// short returns a map with one list that is too short.
func short(cells int) *migratedv1.MemoryMap {
	m := mapOf(cells)
	m.Blocks[0].Missing = m.Blocks[0].Missing[1:]
	return m
}

// TestDestinationWithoutMemory: a destination without memory to show says so.
func TestDestinationWithoutMemory(t *testing.T) {
	d := NewDestination(t.Context(), DestinationConfig{
		Request: &migratedv1.PrepareIncomingRequest{Id: "m"}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
	})
	if _, err := d.Incoming(0); !errors.Is(err, errNoMemoryYet) {
		t.Errorf("before it is prepared: %v", err)
	}
	_ = d.Abort("the test is over")
	<-d.Done()
	if _, err := d.Incoming(0); !errors.Is(err, errNoMemoryYet) {
		t.Errorf("after the end: %v", err)
	}
}
