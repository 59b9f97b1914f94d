// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// TestWithdrawWaitsForTheReadUnderWay: a lane is stopped when it has announced a read and not begun it. A Withdraw that
// only set a flag would return then, the VM would continue, and the read would follow.
func TestWithdrawWaitsForTheReadUnderWay(t *testing.T) {
	e, remote := offer(t, smallRAM(t))
	parked, resume := make(chan struct{}), make(chan struct{})
	var once sync.Once
	e.park = func(point string) {
		if point != "reading" {
			t.Errorf("parked at %q", point)
		}
		once.Do(func() {
			close(parked)
			<-resume
		})
	}
	fetched := make(chan error, 1)
	go func() { fetched <- remote.fetch([]pagewire.Range{{Length: 8192}}, func(pagewire.Run, []byte) {}) }()
	<-parked

	// Two calls of Withdraw at a time: each one must wait.
	returned := make(chan struct{}, 2)
	for range 2 {
		go func() {
			e.Withdraw()
			returned <- struct{}{}
		}()
	}
	// The peer gets the reason although the lane is still stopped.
	wantCode(t, <-fetched, codes.Aborted, ErrWithdrawn.Error())
	select {
	case <-returned:
		t.Fatal("Withdraw returned while a read was under way")
	default:
	}
	close(resume)
	<-returned
	<-returned

	read := false
	e.park = func(string) { read = true }
	l := &lane{export: e, idle: make(chan struct{}, 1)}
	if err := l.begin(); !errors.Is(err, ErrWithdrawn) || read {
		t.Errorf("a read began after Withdraw: %v", err)
	}
}

// attended is a stream that counts how often somebody began to read it, and ended, while its lane waited.
type attended struct {
	requests     int // still to come
	begun, ended int
}

func (a *attended) Recv(r *pagewire.Request) error {
	if a.requests == 0 {
		return io.EOF
	}
	a.requests--
	r.Ranges = append(r.Ranges[:0], pagewire.Range{Length: 4096})
	return nil
}

func (a *attended) Send(*pagewire.Reply) error { return nil }

func (a *attended) Attend() (stop func()) {
	a.begun++
	return func() { a.ended++ }
}

// TestLaneIsAttendedWhileTheVMStops: while the lane waits for the VM to be stopped, its stream is read. Later it is
// not.
func TestLaneIsAttendedWhileTheVMStops(t *testing.T) {
	for _, bulk := range []bool{false, true} {
		s := NewServer(Options{})
		stream := &attended{requests: 3}
		e, err := s.Offer(testID, testToken, smallRAM(t), func(context.Context) error {
			if stream.begun != 1 || stream.ended != 0 {
				t.Errorf("somebody has begun to read %d times, and ended %d times", stream.begun, stream.ended)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		l := &lane{
			export: e, bulk: bulk, idle: make(chan struct{}, 1), packer: newPacker(pagewire.Announced(nil), bulk, &e.link),
		}
		if err := l.serve(t.Context(), stream); err != nil {
			t.Fatal(err)
		}
		if stream.begun != 1 || stream.ended != 1 {
			t.Errorf("after three requests it has begun %d times, and ended %d times", stream.begun, stream.ended)
		}
		e.Withdraw()
	}
}

// counting is a stream with one request that counts the pages of the replies.
type counting struct {
	attended
	pages uint32
}

func (c *counting) Send(reply *pagewire.Reply) error {
	for _, r := range reply.Runs {
		c.pages += r.Length / 4096
	}
	return nil
}

// TestRevokeWaitsForNoRead: Revoke returns while a read is under way, because the VM is continued after it. What the
// read brings is not sent: it may be of the VM that runs.
func TestRevokeWaitsForNoRead(t *testing.T) {
	for name, revoked := range map[string]bool{"revoked": true, "served": false} {
		e, _ := offer(t, smallRAM(t))
		e.park = func(string) { // in the lane's own goroutine: the read is announced and does not go on until Revoke returns
			if revoked {
				e.Revoke()
			}
		}
		stream := &counting{attended: attended{requests: 1}}
		l := &lane{export: e, idle: make(chan struct{}, 1), packer: newPacker(pagewire.Announced(nil), false, &e.link)}
		if err := l.serve(t.Context(), stream); errors.Is(err, ErrWithdrawn) != revoked {
			t.Errorf("%s: the lane ended with %v", name, err)
		}
		if want := map[bool]uint32{true: 0, false: 1}[revoked]; stream.pages != want {
			t.Errorf("%s: %d pages were sent, want %d", name, stream.pages, want)
		}
	}
}

func TestWithdrawEndsIdleLanes(t *testing.T) {
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, smallRAM(t), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	conn := serve(t, s)
	var lanes []testLane
	for range 5 {
		lanes = append(lanes, openLane(t, conn, testID, testToken).accepted(t))
	}
	e.Withdraw()
	for _, l := range lanes {
		wantCode(t, l.RecvMsg(&pagewire.Reply{}), codes.Aborted, ErrWithdrawn.Error())
	}
	err = openLane(t, conn, testID, testToken).RecvMsg(&pagewire.Reply{})
	wantCode(t, err, codes.PermissionDenied, ErrRefused.Error())
	e.Withdraw()

	// The id can be offered again. The old export does not affect the new one when it ends.
	again, err := s.Offer(testID, testToken, smallRAM(t), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Withdraw()
	e.Withdraw()
	openLane(t, conn, testID, testToken).accepted(t)
}

// TestWithdrawRacesWithReaders: lanes read as fast as they can when Withdraw comes. None reads after it.
func TestWithdrawRacesWithReaders(t *testing.T) {
	for range 20 {
		s := NewServer(Options{})
		ram := smallRAM(t)
		e, err := s.Offer(testID, testToken, ram, isStopped)
		if err != nil {
			t.Fatal(err)
		}
		var running sync.WaitGroup
		started := make(chan struct{}, 4)
		for range 4 {
			l, err := e.open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			running.Go(func() {
				defer e.close(l)
				page := make([]byte, 4096)
				for i := 0; ; i++ {
					if err := l.read(&ram.blocks[0], page, 0); err != nil {
						if !errors.Is(err, ErrWithdrawn) {
							t.Error(err) // the file is closed: a lane has read after Withdraw
						}
						return
					}
					if i == 0 {
						started <- struct{}{}
					}
				}
			})
		}
		for range 4 {
			<-started
		}
		e.Withdraw()
		if err := ram.Close(); err != nil {
			t.Error(err)
		}
		running.Wait()
	}
}
