// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// twoVMs starts a source and a destination that have the same RAM file: what the page engine does between two
// files is not the subject here.
func twoVMs(t *testing.T, extra ...string) (source, destination *VM, process *Process) {
	t.Helper()
	path := ramFile(t)
	_, source = start(t, append(ram(path), extra...)...)
	process, destination = start(t, append(append(ram(path), extra...), "-S", "-incoming", "defer")...)
	ctx := testContext(t)
	if err := source.PrepareOutgoing(ctx); err != nil {
		t.Fatal(err)
	}
	if err := destination.PrepareIncoming(ctx); err != nil {
		t.Fatal(err)
	}
	return source, destination, process
}

func TestDeviceStateMoves(t *testing.T) {
	source, destination, _ := twoVMs(t)
	ctx := testContext(t)
	stopped, err := source.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := source.VerifyStopped(ctx); err != nil {
		t.Error(err)
	}
	out, in := socketPair(t)
	loaded := make(chan error, 1)
	go func() { loaded <- destination.MigrateIncomingFD(ctx, in, func() {}) }()
	if err := source.MigrateFD(ctx, out); err != nil {
		t.Fatal(err)
	}
	out.Close()
	if err := <-loaded; err != nil {
		t.Fatal(err)
	}
	if running, err := destination.Running(ctx); err != nil || running {
		t.Errorf("the destination runs before cont: %t, %v", running, err)
	}
	resumed, err := destination.Cont(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !resumed.After(stopped) {
		t.Errorf("stopped %v, resumed %v", stopped, resumed)
	}
	if running, err := destination.Running(ctx); err != nil || !running {
		t.Errorf("after cont: running %t, %v", running, err)
	}
	if err := source.Quit(ctx); err != nil {
		t.Error(err)
	}
}

// The source takes its VM back, disks included, as long as the destination has not run it.
func TestSourceContinuesWithItsDisks(t *testing.T) {
	disk := ramFile(t) + ".disk"
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	source, destination, _ := twoVMs(t, "-drive", "file="+disk+",format=raw,if=none,id=d", "-device", "virtio-blk,drive=d")
	ctx := testContext(t)
	if _, err := source.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	out, in := socketPair(t)
	loaded := make(chan error, 1)
	go func() { loaded <- destination.MigrateIncomingFD(ctx, in, func() {}) }()
	if err := errors.Join(source.MigrateFD(ctx, out), <-loaded); err != nil {
		t.Fatal(err)
	}
	if _, err := source.Cont(ctx); err != nil { // while the destination has loaded everything
		t.Fatal(err)
	}
	if _, err := destination.Cont(ctx); err == nil {
		t.Error("the destination runs, too, on a disk that the source has locked")
	}
}

func TestDestinationKilledWhileLoading(t *testing.T) {
	source, destination, process := twoVMs(t)
	ctx := testContext(t)
	if _, err := source.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	out, relay := socketPair(t)
	narrow(t, out)
	in, feed := socketPair(t)
	loaded := make(chan error, 1)
	go func() { loaded <- destination.MigrateIncomingFD(ctx, in, func() {}) }()
	saved := make(chan error, 1)
	go func() { saved <- source.MigrateFD(ctx, out) }()
	// It has got a part of the stream and waits for more.
	if _, err := io.CopyN(feed, relay, 50<<10); err != nil {
		t.Fatal(err)
	}
	if err := process.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	var gone *qmp.DisconnectedError
	if err := <-loaded; !errors.As(err, &gone) {
		t.Errorf("loading: %v", err)
	}
	relay.Close()
	if err := <-saved; err == nil {
		t.Error("the source saved everything through a socket that was not read")
	}
	continues(ctx, t, source)
}

func TestCancelledWhileSaving(t *testing.T) {
	source, _, _ := twoVMs(t)
	if _, err := source.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	out, in := socketPair(t)
	narrow(t, out)
	ctx, cancel := context.WithCancelCause(testContext(t))
	gaveUp := errors.New("gave up")
	go func() {
		// The stream has begun, and more than a socket holds will not be read.
		if _, err := io.ReadFull(in, make([]byte, 1)); err != nil {
			t.Error(err)
		}
		cancel(gaveUp)
	}()
	if err := source.MigrateFD(ctx, out); !errors.Is(err, gaveUp) {
		t.Errorf("cancelled: %v", err)
	}
	continues(testContext(t), t, source)
}

// narrow makes a socket hold much less than a device state.
func narrow(t *testing.T, f *os.File) {
	t.Helper()
	if err := unix.SetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF, 4096); err != nil {
		t.Fatal(err)
	}
}

// continues checks that a source whose migration failed runs again.
func continues(ctx context.Context, t *testing.T, vm *VM) {
	t.Helper()
	if err := vm.CancelMigrate(ctx); err != nil {
		t.Error(err)
	}
	before := time.Now()
	if at, err := vm.Cont(ctx); err != nil || at.Before(before.Truncate(time.Microsecond)) {
		t.Errorf("continue: %v, %v", at, err)
	}
	if status, err := vm.Status(ctx); err != nil || status != "running" {
		t.Errorf("the source is %q, %v", status, err)
	}
}

func TestBadStreamIsExplained(t *testing.T) {
	_, destination, process := twoVMs(t)
	in, feed := socketPair(t)
	if _, err := feed.WriteString("this is no migration stream"); err != nil {
		t.Fatal(err)
	}
	feed.Close()
	var gone *qmp.DisconnectedError
	err := destination.MigrateIncomingFD(testContext(t), in, func() {})
	if err == nil {
		t.Fatal("garbage was loaded")
	}
	if errors.As(err, &gone) && process.ExitReason() == "" {
		t.Error("QEMU exited and nobody says why")
	}
}

func TestContBeforeTheStateIsLoaded(t *testing.T) {
	_, destination, _ := twoVMs(t)
	if at, err := destination.Cont(testContext(t)); err == nil {
		t.Errorf("an empty VM runs since %v", at)
	}
}

func TestStopOfAStoppedVM(t *testing.T) {
	source, _, _ := twoVMs(t)
	ctx := testContext(t)
	for range 2 {
		before := time.Now().Truncate(time.Microsecond)
		if at, err := source.Stop(ctx); err != nil || at.Before(before) {
			t.Errorf("stopped at %v, %v; asked at %v", at, err, before)
		}
	}
	for range 2 {
		if _, err := source.Cont(ctx); err != nil {
			t.Error(err)
		}
	}
}

// An x-ignore-shared that stayed on would cost a guest its RAM at the next migration by others.
func TestSettingsArePutBack(t *testing.T) {
	path := ramFile(t)
	second := path + ".qmp"
	_, vm := start(t, append(ram(path), "-qmp", "unix:"+second+",server=on,wait=off")...)
	ctx := testContext(t)
	if err := vm.SetCapabilities(ctx, map[string]bool{"auto-converge": true}); err != nil {
		t.Fatal(err)
	}
	before, err := vm.settings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	other, err := Attach(ctx, second)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.PrepareOutgoing(ctx), other.PrepareOutgoing(ctx)); err != nil {
		t.Fatal(err)
	}
	during, err := vm.settings(ctx)
	if err != nil || !during.Capabilities["x-ignore-shared"] || during.Capabilities["auto-converge"] || during.MaxBandwidth != maxBandwidth {
		t.Errorf("prepared: %+v, %v", during, err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	after, err := vm.settings(ctx)
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(Settings{})); diff != "" || err != nil {
		t.Errorf("settings afterwards (-before +after), %v:\n%s", err, diff)
	}
}
