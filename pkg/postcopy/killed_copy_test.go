// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// copierEnv is the variable that makes this program the one that copies and is killed. Its value has the address of the
// memory and the number of pieces.
const copierEnv = "POSTCOPY_TEST_COPIER"

// pieceSize is how many bytes the copier copies at a time, as the engine does.
const pieceSize = copyBytes

// copierMemory is a page that the copier and the test share.
type copierMemory struct {
	record [uffd.CopyRecordSize]byte
	done   atomic.Uint64 // pieces whose UFFDIO_COPY has returned
}

func mapCopierMemory(fd int) (*copierMemory, []uffd.CopyRecord, error) {
	memory, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, nil, err
	}
	m := (*copierMemory)(unsafe.Pointer(&memory[0]))
	return m, uffd.CopyRecords(memory[:uffd.CopyRecordSize]), nil
}

// copier copies piece after piece, and counts them. It is killed meanwhile.
func copier(arguments string) error {
	var addr, pieces uint64
	if _, err := fmt.Sscan(arguments, &addr, &pieces); err != nil {
		return err
	}
	m, records, err := mapCopierMemory(4)
	if err != nil {
		return err
	}
	u, piece := uffd.FromFD(3), make([]byte, pieceSize)
	for i := range pieces {
		if _, err := u.CopyRecorded(&records[0], addr+i*pieceSize, piece, 0); err != nil {
			return err
		}
		m.done.Store(i + 1)
	}
	return nil
}

// TestKernelAnswersWhoIsKilled: if a process is killed in UFFDIO_COPY, the kernel's answer says to the page what was
// copied.
func TestKernelAnswersWhoIsKilled(t *testing.T) {
	const pieces, rounds = 64, 12
	within := 0
	for round := range rounds {
		g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pieces * pieceSize / pageSize}}, Options{Workers: 1})
		fd, err := unix.MemfdCreate("record", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		shared := os.NewFile(uintptr(fd), "record")
		defer shared.Close()
		if err := shared.Truncate(4096); err != nil {
			t.Fatal(err)
		}
		m, records, err := mapCopierMemory(fd)
		if err != nil {
			t.Fatal(err)
		}
		dup, err := unix.Dup(g.uffd.FD())
		if err != nil {
			t.Fatal(err)
		}
		descriptor := os.NewFile(uintptr(dup), "userfaultfd")
		defer descriptor.Close()
		addr := g.blocks[0].Addr
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", copierEnv, addr, pieces))
		cmd.ExtraFiles = []*os.File{descriptor, shared}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, "copying", func() bool { return m.done.Load() > uint64(round) })
		_ = cmd.Process.Kill()
		_ = cmd.Wait()

		done := m.done.Load() * pieceSize
		dst, n, _ := records[0].Answer()
		in := done
		if dst == addr+done { // it was killed before it could count this piece
			in += n
		}
		if dst == addr+done && n > 0 {
			within++
		}
		if got := uint64(g.allocated()) * pageSize; got != in {
			t.Errorf("round %d: %d bytes are there, the kernel's answer says %d: %d and %d at %d",
				round, got, in, done, n, dst-addr)
		}
	}
	t.Logf("%d of %d were killed between a copy and its mark", within, rounds)
}
