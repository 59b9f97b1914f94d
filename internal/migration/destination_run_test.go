// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A QEMU that does not answer in time may obey later. So the migration is not given up, and the source asks again.
func TestRunIsNotAnswered(t *testing.T) {
	l := leaveDestination(t, true)
	d := l.takeUp(t)
	<-d.attaching
	if err := unix.Kill(l.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := d.Run(ctx, &migratedv1.RunRequest{Id: "m1", Resume: true})
	if code := status.Code(ToStatus(codes.FailedPrecondition, err)); code != codes.Unknown {
		t.Errorf("Run: %v, which is %v to the source; want one that it asks again after", err, code)
	}
	if err := d.Abort("the test says so"); err == nil {
		t.Error("a VM that may run yet is given up")
	}
	if err := unix.Kill(l.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, d); err != nil || !l.runs(t) {
		t.Errorf("Run again: %v; the VM runs: %v", err, l.runs(t))
	}
}

// QEMU may need a page before it can answer. So pages are fetched meanwhile, also over new lanes.
func TestPagesComeWhileRunWaits(t *testing.T) {
	l := leaveDestination(t, true)
	var opened atomic.Int32
	pages := pagelane.NewServer(func(lane *pagelane.Stream) error {
		opened.Add(1)
		return errors.Join(lane.Accept(), status.Error(codes.Unavailable, "the test ends it"))
	}, nil)
	server := grpc.NewServer(grpc.Creds(pages.Credentials(insecure.NewCredentials())))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }() // until Stop
	t.Cleanup(func() { server.Stop(); pages.Close() })
	var told atomic.Bool // lanes lost before that would end the migration
	d := l.takeUpWith(t, t.Context(), func(ctx context.Context, _ string) (net.Conn, error) {
		if !told.Load() {
			return nil, errors.New("not yet")
		}
		return pagelane.Dial(ctx, listener.Addr().String(), insecure.NewCredentials(), nil)
	})
	<-d.attaching
	if err := unix.Kill(l.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() {
		_, err := d.Run(ctx, &migratedv1.RunRequest{Id: "m1", Resume: true})
		answered <- err
	}()
	// Two lanes are opened at a time.
	for deadline := time.Now().Add(resumeTimeout / 3); opened.Load() < 6; time.Sleep(time.Millisecond) {
		told.Store(d.kept.header().toldToRun.Load() != 0)
		select {
		case err := <-answered:
			t.Fatalf("Run: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d lanes were opened while Run waited", opened.Load())
		}
	}
	cancel()
	if err := <-answered; !errors.Is(err, errAskAgain) {
		t.Errorf("Run: %v", err)
	}
	if err := unix.Kill(l.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, d); err != nil || !l.runs(t) {
		t.Errorf("Run again: %v; the VM runs: %v", err, l.runs(t))
	}
}

// Lanes that are lost before QEMU was told to run the VM end the migration permanently, also if Run arrives at the
// same time.
func TestPagesLostBeforeRun(t *testing.T) {
	l := leaveDestination(t, true)
	d := l.takeUp(t)
	<-d.attaching
	if !d.doom() {
		t.Fatal("it was told to run the VM")
	}
	if _, err := run(t, d); !errors.Is(err, ErrNotRun) || l.runs(t) {
		t.Errorf("Run: %v, want ErrNotRun; the VM runs: %v", err, l.runs(t))
	}
}

// A daemon that is stopped while QEMU is told to run the VM does not know whether QEMU got the command. It still does
// not know when the source asks again; the next daemon does.
func TestStoppedWhileRunWaits(t *testing.T) {
	l := leaveDestination(t, true)
	daemon, stop := context.WithCancelCause(t.Context())
	d := l.takeUpWith(t, daemon, noSource)
	<-d.attaching
	if err := unix.Kill(l.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 1)
	go func() {
		_, err := run(t, d)
		told <- err
	}()
	for d.kept.header().toldToRun.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	stop(errors.New("the daemon was stopped"))
	if err := d.vm.QMP.Disconnect(); err != nil { // as release does
		t.Error(err)
	}
	_, again := run(t, d)
	for _, err := range []error{<-told, again} {
		if code := status.Code(ToStatus(codes.FailedPrecondition, err)); code != codes.Unknown {
			t.Errorf("Run: %v, which is %v to the source; want one that it asks again after", err, code)
		}
	}
	if err := unix.Kill(l.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
}
