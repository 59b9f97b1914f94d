// SPDX-License-Identifier: Apache-2.0

package uffdtest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Kind is the kind of memory.
type Kind uint64

// The kinds of memory that userfaultfd supports.
const (
	Anon    Kind = iota // private anonymous
	Shmem               // a memfd (tmpfs)
	Hugetlb             // a memfd of huge pages; see ReserveHugePages
)

func (k Kind) String() string { return [...]string{"anon", "shmem", "hugetlb"}[k] }

// PageSize is the kind's page size in bytes, on the machines that run the tests.
func (k Kind) PageSize() uint64 {
	if k == Hugetlb {
		return hugePageSize
	}
	return 4096
}

// Page returns a page of bytes. Each byte depends on seed and on its position, so that a page in the wrong place shows.
func Page(kind Kind, seed uint64) []byte {
	p := make([]byte, kind.PageSize())
	for i := range p {
		p[i] = byte(uint64(i)*31 + uint64(i)>>8 + seed*7 + 1)
	}
	return p
}

// Map maps new memory of that many pages in the child.
func (c *Child) Map(kind Kind, pages uint64) uffd.Range {
	c.t.Helper()
	length := pages * kind.PageSize()
	addr, _ := c.must("mmap of "+kind.String(), request{Op: opMap, X: uint64(kind), Y: length})
	return uffd.Range{Start: addr, Len: length}
}

// Alias maps the memory that Map mapped last a second time: the same page cache, but not registered.
func (c *Child) Alias(r uffd.Range) uint64 {
	c.t.Helper()
	addr, _ := c.must("mmap", request{Op: opAlias, Y: r.Len})
	return addr
}

// Truncate sets the size, in bytes, of the file of the memory that Map mapped last.
func (c *Child) Truncate(size uint64) {
	c.t.Helper()
	c.must("ftruncate", request{Op: opTruncate, X: size})
}

// Action is something that the child does with memory.
type Action struct {
	action, x, y, z uint64
}

// Read reads the 8 bytes at addr.
func Read(addr uint64) Action { return Action{action: 1, x: addr} }

// Write writes 8 bytes at addr.
func Write(addr, value uint64) Action { return Action{action: 2, x: addr, y: value} }

// Discard is madvise(MADV_DONTNEED).
func Discard(r uffd.Range) Action {
	return Action{action: 3, x: r.Start, y: r.Len, z: unix.MADV_DONTNEED}
}

// Punch is madvise(MADV_REMOVE): the pages leave the page cache, too.
func Punch(r uffd.Range) Action {
	return Action{action: 3, x: r.Start, y: r.Len, z: unix.MADV_REMOVE}
}

// Unmap is munmap(2).
func Unmap(r uffd.Range) Action { return Action{action: 4, x: r.Start, y: r.Len} }

// Move is mremap(2) to the address to. It replaces what is mapped there.
func Move(r uffd.Range, to uint64) Action { return Action{action: 5, x: r.Start, y: r.Len, z: to} }

// NotInherited is madvise(MADV_DONTFORK): forked processes do not get the memory.
func NotInherited(r uffd.Range) Action {
	return Action{action: 3, x: r.Start, y: r.Len, z: unix.MADV_DONTFORK}
}

// Fork forks. The new process reads one byte at addr, if addr is not 0. The Value is that byte, or minus the signal
// that killed the new process.
func Fork(addr uint64) Action { return Action{action: 6, x: addr} }

// Touch reads the first byte of each page in r, in order; the Value is their sum.
func Touch(r uffd.Range, kind Kind) Action {
	return Action{action: 7, x: r.Start, y: r.Len, z: kind.PageSize()}
}

// Do has the child do a in its main thread. The child answers no other request meanwhile, so a must not block.
func (c *Child) Do(a Action) Result {
	c.t.Helper()
	r, _ := c.call(request{Op: opDo, Action: a.action, X: a.x, Y: a.y, Z: a.z})
	return r
}

// Pending is an action that a thread of the child is doing.
type Pending struct {
	ThreadID uint32

	c    *Child
	slot uint64
}

// Go has a new thread of the child do a. At most 64 may be pending.
func (c *Child) Go(a Action) Pending {
	c.t.Helper()
	c.slot++
	tid, _ := c.must("pthread_create", request{Op: opStart, Slot: c.slot, Action: a.action, X: a.x, Y: a.y, Z: a.z})
	return Pending{ThreadID: uint32(tid), c: c, slot: c.slot}
}

// Join waits for the thread.
func (p Pending) Join() Result {
	p.c.t.Helper()
	r, _ := p.c.call(request{Op: opJoin, Slot: p.slot})
	return r
}

// Waiting reports whether the thread waits in a page fault, or for an event of its own to be read.
func (p Pending) Waiting() bool {
	p.c.t.Helper()
	// The kernel function that the thread sleeps in (proc(5)): handle_userfault, userfaultfd_event_wait_completion…
	wchan, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/wchan", p.c.Pid, p.ThreadID))
	return err == nil && bytes.Contains(wchan, []byte("userfault"))
}

// Ended reports whether the thread is gone.
func (p Pending) Ended() bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", p.c.Pid, p.ThreadID))
	return errors.Is(err, fs.ErrNotExist)
}

// WaitWaiting waits until the thread is Waiting.
func (p Pending) WaitWaiting() {
	p.c.t.Helper()
	for deadline := time.Now().Add(patience); !p.Waiting(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(deadline) {
			p.c.t.Fatalf("thread %d of the child does not wait for us after %v", p.ThreadID, patience)
		}
	}
}

// JoinOK waits for the thread and returns its value. It fails the test if the action failed.
func (p Pending) JoinOK() uint64 {
	p.c.t.Helper()
	r := p.Join()
	if r.Errno != 0 {
		p.c.t.Fatalf("child: %v (value %d)", r.Errno, r.Value)
	}
	return uint64(r.Value)
}
