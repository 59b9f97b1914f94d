// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// The monitor is lost while QEMU is told to run the VM, for example when libvirt's daemon ends. QEMU lives on. The
// source asks again, and the destination asks QEMU over a new monitor.
func TestMonitorLostWhileRunWaits(t *testing.T) {
	l := leaveDestination(t, true)
	d := l.takeUp(t)
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
	if err := d.vm.QMP.Disconnect(); err != nil {
		t.Error(err)
	}
	err := <-told
	if code := status.Code(ToStatus(codes.FailedPrecondition, err)); code != codes.Unknown {
		t.Errorf("Run: %v, which is %v to the source; want one that it asks again after", err, code)
	}
	if view, _ := d.Snapshot(); Terminal(view.GetState()) {
		t.Errorf("it is %v: %v", view.GetState(), view.GetError())
	}
	if err := unix.Kill(l.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, d); err != nil || !l.runs(t) {
		t.Errorf("Run again: %v; the VM runs: %v", err, l.runs(t))
	}
}

// A monitor that is lost before Run means that QEMU cannot be told to run the VM: the migration is given up, also if
// Run arrives at the same time.
func TestMonitorLostBeforeRun(t *testing.T) {
	l := leaveDestination(t, true)
	d := l.takeUp(t)
	<-d.attaching
	if err := d.vm.QMP.Disconnect(); err != nil {
		t.Error(err)
	}
	if _, err := run(t, d); !errors.Is(err, ErrNotRun) {
		t.Errorf("Run: %v, want ErrNotRun", err)
	}
	<-d.Done()
	if view, _ := d.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED {
		t.Errorf("it is %v", view.GetState())
	}
	if l.vm.Alive() == nil && l.runs(t) {
		t.Error("the VM runs")
	}
}
