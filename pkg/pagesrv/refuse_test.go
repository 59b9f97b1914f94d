// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// eventually polls until the condition holds, with a deadline far beyond what is needed.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want code %v with %q", err, code, text)
	}
}

func smallRAM(t testing.TB) *RAM {
	f := ramFile(t, 1<<20, pattern)
	return openRAM(t, Block{ID: "pc.ram", Path: f.Name(), Size: 1 << 20, PageSize: 4096},
		Block{ID: "huge", Path: f.Name(), Size: 1 << 20, PageSize: 64 << 10})
}

// TestStrangersAreRefused: a wrong token and an unknown id get the same answer.
func TestStrangersAreRefused(t *testing.T) {
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, smallRAM(t), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	conn := serve(t, s)
	for _, who := range [][2]string{{testID, "guess"}, {testID, ""}, {"other", testToken}, {"", ""}} {
		err := openLane(t, conn, who[0], who[1]).RecvMsg(&pagewire.Reply{})
		wantCode(t, err, codes.PermissionDenied, ErrRefused.Error())
	}
	if _, err := s.Offer(testID, "another", smallRAM(t), isStopped); !errors.Is(err, ErrOffered) {
		t.Errorf("second offer: %v", err)
	}
}

func TestInvalidRangesEndTheLane(t *testing.T) {
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, smallRAM(t), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	conn := serve(t, s)
	many := make([]pagewire.Range, 33)
	for i := range many {
		many[i] = pagewire.Range{Length: 1 << 20}
	}
	for _, test := range []struct {
		name   string
		ranges []pagewire.Range
		text   string
	}{
		{"unknown block", []pagewire.Range{{Length: 4096}, {Block: 2, Length: 4096}}, "range 1: block 2, there are 2"},
		{"last block number", []pagewire.Range{{Block: math.MaxUint32, Length: 4096}}, "block 4294967295"},
		{"no bytes", []pagewire.Range{{Length: 4096}, {}}, "range 1: 0 bytes at 0x0"},
		{"part of a page", []pagewire.Range{{Length: 4095}}, "not whole pages of 4096"},
		{"misaligned", []pagewire.Range{{Offset: 512, Length: 4096}}, "at 0x200 of block 0 (pc.ram)"},
		{"part of a larger page", []pagewire.Range{{Block: 1, Offset: 4096, Length: 64 << 10}}, "not whole pages of 65536"},
		{"beyond the end", []pagewire.Range{{Offset: 1<<20 - 4096, Length: 8192}}, "exceed block 0 (pc.ram) of 0x100000"},
		{"at the end", []pagewire.Range{{Offset: 1 << 20, Length: 4096}}, "exceed"},
		{"far away", []pagewire.Range{{Offset: math.MaxUint64 - 8191, Length: 4096}}, "exceed"},
		{"too much", many, "at most"},
	} {
		t.Run(test.name, func(t *testing.T) {
			lane := openLane(t, conn, testID, testToken).accepted(t)
			err := lane.fetch(test.ranges, func(pagewire.Run, []byte) { t.Error("pages were served") })
			wantCode(t, err, codes.InvalidArgument, test.text)
		})
	}
	if got := e.Stats().Pages; got != 0 {
		t.Errorf("%d pages were read", got)
	}
}

// TestRunningVMIsNotServed: a lane can be opened while the VM still runs, but gets no page. Once the VM was seen
// stopped, stopped is not called again.
func TestRunningVMIsNotServed(t *testing.T) {
	running := errors.New("query-status says running")
	var asked atomic.Int32
	var stopped atomic.Bool
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, smallRAM(t), func(context.Context) error {
		asked.Add(1)
		if !stopped.Load() {
			return running
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	conn := serve(t, s)
	page := []pagewire.Range{{Length: 4096}}

	early := openLane(t, conn, testID, testToken).accepted(t)
	if asked.Load() != 0 {
		t.Error("the VM was asked about before the first request")
	}
	err = early.fetch(page, func(pagewire.Run, []byte) { t.Error("a page of a running VM was served") })
	wantCode(t, err, codes.FailedPrecondition, running.Error())
	if err := e.confirm(t.Context()); !errors.Is(err, ErrNotStopped) || !errors.Is(err, running) {
		t.Errorf("untyped: %v", err)
	}

	stopped.Store(true)
	asked.Store(0)
	for range 3 {
		lane := openLane(t, conn, testID, testToken)
		if err := lane.fetch(page, func(pagewire.Run, []byte) {}); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("asked %d times", asked.Load())
	}
}

func TestLanesAreLimited(t *testing.T) {
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, smallRAM(t), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	conn := serve(t, s)
	var last testLane
	for range MaxLanes {
		last = openLane(t, conn, testID, testToken).accepted(t)
	}
	err = openLane(t, conn, testID, testToken).RecvMsg(&pagewire.Reply{})
	wantCode(t, err, codes.ResourceExhausted, ErrTooManyLanes.Error())
	if err := last.CloseSend(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a lane to end", func() bool { return e.Stats().Lanes < MaxLanes })
	openLane(t, conn, testID, testToken).accepted(t)
}
