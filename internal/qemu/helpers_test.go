// SPDX-License-Identifier: Apache-2.0

package qemu_test

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// twoVMs starts a source and a destination on the same RAM file: copying memory between two files is not tested here.
func twoVMs(t *testing.T, extra ...string) (source, destination *qemu.VM, process *launch.Process) {
	t.Helper()
	path := qemutest.RAMFile(t)
	_, source = qemutest.Start(t, append(qemutest.RAM(path), extra...)...)
	process, destination = qemutest.Start(t, append(append(qemutest.RAM(path), extra...), "-S", "-incoming", "defer")...)
	if err := destination.PrepareIncoming(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	return source, destination, process
}

// save stops a VM and returns its device state as a stream.
func save(t *testing.T, vm *qemu.VM, giveUpDisks bool) []byte {
	t.Helper()
	ctx := qemutest.Context(t)
	if _, _, err := vm.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	saver, err := vm.NewSaver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	state, err := saver.Save(ctx, giveUpDisks, nil)
	if err := errors.Join(err, saver.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	if _, err := devicestate.Parse(state); err != nil {
		t.Fatal(err)
	}
	facts, err := vm.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return append(devicestate.Head(facts.MachineType), devicestate.Body(state)...)
}

// socketPair returns two connected sockets, as files.
func socketPair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// load makes a destination load a stream and waits for the result.
func load(t *testing.T, vm *qemu.VM, stream []byte) error {
	t.Helper()
	in, feed := socketPair(t)
	go func() {
		_, _ = feed.Write(stream) // a QEMU that fails does not read all of it
		feed.Close()
	}()
	loading, err := vm.BeginLoading(qemutest.Context(t), in)
	if err != nil {
		return err
	}
	return loading.Wait(qemutest.Context(t))
}

// withDisk returns the arguments that give a VM a disk with a new image.
func withDisk(t *testing.T) []string {
	t.Helper()
	disk := qemutest.RAMFile(t) + ".disk"
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-drive", "file=" + disk + ",format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"}
}
