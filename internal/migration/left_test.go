// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A left is a destination as a killed daemon leaves it: a QEMU, a userfaultfd in it, and the files.
type left struct {
	dir  string
	vm   *qemu.VM // the test's own eyes
	kept *kept
	pid  int
}

// leaveDestination brings a real QEMU to where it waits for the device state or, loaded, has it. All of its RAM is
// there, so that no page server is needed.
func leaveDestination(t *testing.T, loaded bool) *left {
	t.Helper()
	dir := t.TempDir()
	ram, err := os.CreateTemp("/dev/shm", "left-")
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	t.Cleanup(func() { _ = os.Remove(ram.Name()) })
	if err := unix.Fallocate(int(ram.Fd()), 0, 0, 32<<20); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	sourceVM := startLeft(t, ram.Name(), filepath.Join(dir, "source.sock"), "")
	l := &left{dir: filepath.Join(dir, "m1")}
	// Two sockets: one is the daemon's.
	l.vm = startLeft(t, ram.Name(), filepath.Join(dir, "destination.sock"), filepath.Join(dir, "qmp.sock"), "-S", "-incoming", "defer")
	l.pid = l.vm.Pid
	if err := errors.Join(l.vm.PrepareIncoming(ctx), os.Mkdir(l.dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	facts, err := l.vm.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	taken, err := inject.Take(ctx, l.vm.Pid, inject.TakeOptions{HandDevice: l.vm.HandFD})
	if err != nil {
		t.Fatal(err)
	}
	defer taken.UFFD.Close()
	identity, err := l.vm.Identity()
	if err != nil {
		t.Fatal(err)
	}
	b := facts.RAMBlocks[slices.IndexFunc(facts.RAMBlocks, func(b qemu.RAMBlock) bool { return b.ID == "ram0" })]
	written := &keptFactsV1{
		QEMU: identity, QMP: filepath.Join(dir, "qmp.sock"), RemoteFD: taken.RemoteFD,
		Blocks: []keptBlock{{ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize}},
	}
	request := &migratedv1.PrepareIncomingRequest{Id: "m1", Protocol: 1, Token: "secret", PageAddresses: []string{"192.0.2.1:7600"}}
	if l.kept, err = keep(l.dir, written, request); err != nil {
		t.Fatal(err)
	}
	if _, err := postcopy.New(postcopy.Options{Blocks: written.engineBlocks(taken.UFFD), State: l.kept.states()}); err != nil {
		t.Fatal(err)
	}
	if loaded {
		load(t, sourceVM, l.vm)
		l.kept.header().loaded.Store(1)
	}
	return l
}

// startLeft starts a QEMU and attaches to it. It outlives the test's end by nothing.
func startLeft(t *testing.T, ram, socket, second string, args ...string) *qemu.VM {
	t.Helper()
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	all := append([]string{binary, "-machine", "q35,memory-backend=ram0", "-accel", "tcg", "-m", "32M",
		"-object", "memory-backend-file,id=ram0,size=32M,share=on,mem-path=" + ram,
		"-nodefaults", "-display", "none", "-qmp", "unix:" + socket + ",server=on,wait=off"}, args...)
	if second != "" {
		all = append(all, "-qmp", "unix:"+second+",server=on,wait=off")
	}
	process, vm, err := qemu.Start(t.Context(), qemu.StartOptions{Args: all, Dir: "/", QMPPath: socket, PipePath: socket + ".pipe", LogPath: socket + ".log"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(process.Kill(context.Background()), vm.Close()); err != nil {
			t.Error(err)
		}
	})
	return vm
}

// load moves the device state.
func load(t *testing.T, from, to *qemu.VM) {
	t.Helper()
	ctx := t.Context()
	facts, err := from.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	saver, err := from.NewSaver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := from.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	state, err := saver.Save(ctx, true, nil)
	if err := errors.Join(err, saver.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	carrier, err := newDeviceCarrier()
	if err != nil {
		t.Fatal(err)
	}
	defer carrier.close()
	go func() {
		_, _ = carrier.ours.Write(append(devicestate.Head(facts.MachineType), devicestate.Body(state)...)) // QEMU says if it did not get all
	}()
	loading, err := to.BeginLoading(ctx, carrier.qemu)
	if err != nil {
		t.Fatal(err)
	}
	if err := loading.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}

// takeUp is what a daemon that is started again does.
func (l *left) takeUp(t *testing.T) *Destination {
	t.Helper()
	return l.takeUpBy(t, t.Context(), noSource)
}

func noSource(context.Context, string) (net.Conn, error) { return nil, errors.New("no source here") }

// takeUpBy does it by a daemon of that life, which connects to the source like this.
func (l *left) takeUpBy(t *testing.T, daemon context.Context, dial func(context.Context, string) (net.Conn, error)) *Destination { //nolint:revive // t first, as everywhere
	t.Helper()
	if err := l.kept.close(); err != nil {
		t.Fatal(err)
	}
	d, err := TakeUpDestination(daemon, DestinationConfig{
		Dir: l.dir, FaultWorkers: 1, Log: slog.New(slog.DiscardHandler), Dial: dial,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.cancel(errors.New("the test is over"))
		<-d.Done()
	})
	return d
}

// run repeats Run as a source does while QEMU does not answer yet.
func run(t *testing.T, d *Destination) (*migratedv1.RunResponse, error) {
	t.Helper()
	if d.attaching != nil {
		<-d.attaching
	}
	return d.Run(t.Context(), &migratedv1.RunRequest{Id: "m1", Resume: true})
}

// runs says whether the VM runs. One that has touched a page which nobody brings keeps QEMU's big lock where a device is
// in between, and QEMU does not answer: it runs, too.
func (l *left) runs(t *testing.T) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	running, err := l.vm.Running(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return l.vm.Alive() == nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return running
}

func (l *left) filesStay() bool {
	_, err := os.Stat(filepath.Join(l.dir, keptFacts))
	return !errors.Is(err, fs.ErrNotExist)
}
