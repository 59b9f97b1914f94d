// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// breakPage replaces a page of a QEMU's private memory by one that cannot be read. It maps a page beyond the end of a
// file, so that reading it fails as for broken memory.
func breakPage(t *testing.T, pid int, addr uint64) {
	t.Helper()
	ctx := testContext(t)
	p, err := inject.Seize(ctx, pid)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Detach(); err != nil {
			t.Error(err)
		}
	}()
	fd, err := p.Syscall(ctx, unix.SYS_MEMFD_CREATE, uintptr(addr), 0) // the page is zero, and so an empty name
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Syscall(ctx, unix.SYS_MMAP, uintptr(addr), 4096, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_FIXED, fd, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Syscall(ctx, unix.SYS_CLOSE, fd); err != nil {
		t.Fatal(err)
	}
}

// TestBrokenMemory moves a VM with a page that the source can no longer read. The guest's memory arrives unchanged, as
// does the page next to the broken one, and both hosts report that one page is lost.
func TestBrokenMemory(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	vm := plainLinux(t, lab.VMConfig{VCPUs: 1, MemoryMiB: 256, Nodes: 1, Backend: lab.BackendDefault},
		"mem=192M", "migrated.mem=64", "migrated.workers=1")
	if err := l.Install(testContext(t), vm); err != nil {
		t.Fatal(err)
	}
	var guest report.Log
	bootLinux(t, l.A, vm, &guest)
	source, err := qemu.Attach(testContext(t), l.A.Path(lab.QMPPath))
	if err != nil {
		t.Fatal(err)
	}
	ram := block(t, source, "pc.ram")
	pid := source.Pid
	const untouched = 224 << 20 // beyond the memory that the guest's kernel uses (mem=192M)
	// The page before it is written, so that there is memory to read when the page breaks: memory that was never
	// touched is known to be zero without being read.
	mark := []byte("next to it")
	if _, err := memoryOf(t, source).WriteAt(mark, int64(ram.Addr+untouched-4096)); err != nil {
		t.Fatal(err)
	}
	if err := source.Close(); err != nil {
		t.Fatal(err)
	}
	client := control(t, l.A)
	prepare(t, client, "broken", &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: l.B.DaemonAddr()})
	breakPage(t, pid, ram.Addr+untouched)
	start(t, client, "broken", nil)
	if m := completed(t, awaitEnd(t, client, "broken")); m.GetProgress().GetPagesLost() != 1 {
		t.Fatalf("%d pages are lost: %v", m.GetProgress().GetPagesLost(), m)
	}
	if there := awaitEnd(t, control(t, l.B), "broken"); there.GetProgress().GetPagesLost() != 1 {
		t.Errorf("the destination says %v", there)
	}
	destination, err := qemu.Attach(testContext(t), l.B.Path(lab.QMPPath))
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(mark))
	if _, err := memoryOf(t, destination).ReadAt(
		got, int64(block(t, destination, "pc.ram").Addr+untouched-4096),
	); err != nil || !bytes.Equal(got, mark) {
		t.Errorf("the page next to the broken one holds %q, %v", got, err)
	}
	if err := destination.Close(); err != nil {
		t.Error(err)
	}
	v, err := openGuest(t, l.B, &guest).Verify(testContext(t))
	if err != nil || v.Corruptions != 0 || v.Pages == 0 {
		t.Errorf("the guest finds: %+v, %v", v, err)
	}
}
