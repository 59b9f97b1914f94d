// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A left is a destination as a killed daemon leaves it: a QEMU, a userfaultfd in it, and the files.
type left struct {
	dir  string
	vm   *qemu.VM // the test's own monitor
	kept *keptFiles
	pid  int
}

// leaveDestination brings a real QEMU to the point where it waits for the device state, or, if loaded is set, has
// loaded it. All of its RAM is present, so no page server is needed.
func leaveDestination(t *testing.T, loaded bool) *left {
	t.Helper()
	dir := t.TempDir()
	file, err := os.CreateTemp("/dev/shm", "left-")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	t.Cleanup(func() { _ = os.Remove(file.Name()) })
	if err := unix.Fallocate(int(file.Fd()), 0, 0, 32<<20); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	firmware := haltingFirmware(t) // SeaBIOS would soon wait for a page that no source brings, and so would QEMU
	sourceVM := startQEMU(t, file.Name(), filepath.Join(dir, "source.sock"), "", "-bios", firmware)
	l := &left{dir: filepath.Join(dir, "m1")}
	// It has two monitor sockets: one for the daemon.
	l.vm = startQEMU(t, file.Name(), filepath.Join(dir, "destination.sock"), filepath.Join(dir, "qmp.sock"),
		"-bios", firmware, "-S", "-incoming", "defer")
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
	b := facts.RAMBlocks[slices.IndexFunc(facts.RAMBlocks, func(b ram.Block) bool { return b.ID == "ram0" })]
	written := &keptFactsV1{
		QEMU: identity, QMP: filepath.Join(dir, "qmp.sock"), RemoteFD: taken.RemoteFD,
		Blocks: []keptBlock{{ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize}},
	}
	request := &migratedv1.PrepareIncomingRequest{
		Id: "m1", Protocol: 1, Token: "secret", PageAddresses: []string{"192.0.2.1:7600"},
	}
	if l.kept, err = createKept(l.dir, written, request); err != nil {
		t.Fatal(err)
	}
	if _, err := postcopy.New(postcopy.Options{
		Blocks: written.engineBlocks(taken.UFFD), State: l.kept.states(),
	}); err != nil {
		t.Fatal(err)
	}
	if loaded {
		load(t, sourceVM, l.vm)
		l.kept.header().loaded.Store(1)
	}
	return l
}

// ran writes what a daemon writes when its VM runs.
func (l *left) ran() {
	s := destinationState{kept: l.kept}
	answer := &migratedv1.RunResponse{ResumeTime: durationpb.New(3 * time.Millisecond)}
	s.markRunning(time.Now(), false, answer, 7*time.Millisecond)
}

// startQEMU starts a QEMU and attaches to it. The test's cleanup ends it.
func startQEMU(t *testing.T, ram, socket, second string, args ...string) *qemu.VM {
	t.Helper()
	all := append([]string{qemutest.Binary(t), "-machine", "q35,memory-backend=ram0", "-accel", "tcg", "-m", "32M",
		"-object", "memory-backend-file,id=ram0,size=32M,share=on,mem-path=" + ram,
		"-nodefaults", "-display", "none", "-qmp", "unix:" + socket + ",server=on,wait=off"}, args...)
	if second != "" {
		all = append(all, "-qmp", "unix:"+second+",server=on,wait=off")
	}
	_, vm := qemutest.StartWith(t, nil, launch.Options{
		Args: all, Dir: "/", QMPPath: socket, PipePath: socket + ".pipe", LogPath: socket + ".log",
	})
	return vm
}

// load moves the device state from one QEMU to the other.
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
		// QEMU reports it if something is missing.
		_, _ = carrier.ours.Write(append(devicestate.Head(facts.MachineType), devicestate.Body(state)...))
	}()
	loading, err := to.BeginLoading(ctx, carrier.qemu)
	if err != nil {
		t.Fatal(err)
	}
	if err := loading.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}

// takeUp takes the migration up as a restarted daemon does.
func (l *left) takeUp(t *testing.T) *Destination {
	t.Helper()
	return l.takeUpWith(t, t.Context(), noSource)
}

func noSource(context.Context, string) (net.Conn, error) { return nil, errors.New("no source here") }

// takeUpWith is takeUp with the daemon's context and a function that connects to the source.
func (l *left) takeUpWith(
	t *testing.T, daemon context.Context, //nolint:revive // t first, as everywhere
	dial func(context.Context, string) (net.Conn, error),
) *Destination {
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

// run calls Run once QEMU's monitor is connected.
func run(t *testing.T, d *Destination) (*migratedv1.RunResponse, error) {
	t.Helper()
	if d.attaching != nil {
		<-d.attaching
	}
	return d.Run(t.Context(), &migratedv1.RunRequest{Id: "m1", Resume: true})
}

// runs says whether the VM runs. If the VM has touched a page that nobody brings while a device was involved, QEMU
// keeps its big lock and does not answer: such a VM runs, too.
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
