// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"os"
	"os/exec"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// brokenMemory returns memory of this process of so many pages. The n pages from page broken on cannot be read, because
// they are mapped from a file that has become shorter. Reading them fails as reading broken memory does.
func brokenMemory(t *testing.T, pages, broken, n int) []byte {
	t.Helper()
	memory, err := unix.Mmap(-1, 0, pages*minPageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(memory) })
	for i := range pages {
		for j := range minPageSize {
			memory[i*minPageSize+j] = byte(i + 1)
		}
	}
	empty, err := unix.MemfdCreate("empty", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(empty)
	at := uintptr(unsafe.Pointer(&memory[broken*minPageSize]))
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, at, uintptr(n*minPageSize), unix.PROT_READ,
		unix.MAP_PRIVATE|unix.MAP_FIXED, uintptr(empty), 0); errno != 0 {
		t.Fatal(errno)
	}
	return memory
}

// TestLostPages: on a lane that accepts lost pages, each page that cannot be read comes as lost, and all others come.
func TestLostPages(t *testing.T) {
	const pages, broken, n = 64, 21, 3
	memory := brokenMemory(t, pages, broken, n)
	ram := openRAM(t, Block{
		ID: "ram", PID: os.Getpid(), Addr: uint64(uintptr(unsafe.Pointer(&memory[0]))),
		Size: pages * minPageSize, PageSize: minPageSize,
	})
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, ram, isStopped)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Withdraw)
	conn := serve(t, s)
	open := func(more ...string) testLane {
		stream, err := migratedv1.NewPageServiceClient(conn).Fetch(metadata.AppendToOutgoingContext(t.Context(),
			append([]string{pagewire.MigrationIDKey, testID, pagewire.MigrationTokenKey, testToken}, more...)...))
		if err != nil {
			t.Fatal(err)
		}
		return testLane{stream}
	}
	all := []pagewire.Range{{Length: pages * minPageSize}}
	if err := open().fetch(all, func(pagewire.Run, []byte) {}); err == nil {
		t.Error("a lane that cannot be told of lost pages is served as if there were none")
	}
	got := make([]byte, 0, pages)
	err = open(pagewire.LostKey, pagewire.CanLose).fetch(all, func(run pagewire.Run, data []byte) {
		for i := range int(run.Length) / minPageSize {
			switch {
			case run.Lost:
				got = append(got, 0)
			case !bytes.Equal(
				data[i*minPageSize:(i+1)*minPageSize], bytes.Repeat(data[i*minPageSize:i*minPageSize+1], minPageSize),
			):
				t.Errorf("the page at %#x is a mixture", run.Offset+uint64(i)*minPageSize)
			default:
				got = append(got, data[i*minPageSize])
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		want := byte(i + 1)
		if i >= broken && i < broken+n {
			want = 0
		}
		if i >= len(got) || got[i] != want {
			t.Fatalf("page %d of % x", i, got)
		}
	}
	if lost := e.Stats().LostPages; lost != n {
		t.Errorf("%d pages are counted as lost, of %d", lost, n)
	}
}

// TestLostIsNotEnding: reading memory of a process that is being ended fails in the same way as reading lost pages. It
// must not be taken for them.
func TestLostIsNotEnding(t *testing.T) {
	if isEnding(os.Getpid()) {
		t.Error("this process is taken for one that is being ended")
	}
	child := exec.Command("true")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	zombie := child.Process.Pid
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, zombie, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if !isEnding(zombie) {
		t.Error("a process that has ended is taken for one that lives")
	}
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	if !isEnding(zombie) {
		t.Error("a process that is gone is taken for one that lives")
	}
	b := &openBlock{Block: Block{PID: os.Getpid()}}
	for err, want := range map[error]bool{
		unix.EIO: true, unix.EHWPOISON: true, unix.EINVAL: false, ErrProcessGone: false,
	} {
		if b.isLost(endLane(0, ErrRAM, "%w", &os.PathError{Op: "read", Err: err})) != want {
			t.Errorf("%v: want %v", err, want)
		}
	}
}
