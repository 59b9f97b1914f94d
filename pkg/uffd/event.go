// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"encoding/binary"
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// EventKind says which part of an Event is filled in.
type EventKind uint8

const (
	// EventPagefault: a thread waits for a page (Event.Pagefault).
	EventPagefault EventKind = abi.UFFD_EVENT_PAGEFAULT

	// EventFork: the process forked (Event.Fork). The child's memory is registered with a new userfaultfd.
	EventFork EventKind = abi.UFFD_EVENT_FORK

	// EventRemap: mremap(2) moved registered memory (Event.Remap).
	EventRemap EventKind = abi.UFFD_EVENT_REMAP

	// EventRemove: pages were discarded (Event.Remove) by MADV_DONTNEED, MADV_REMOVE or MADV_FREE. They must read as
	// zeros from now on, even if their old content is in flight.
	EventRemove EventKind = abi.UFFD_EVENT_REMOVE

	// EventUnmap: the range is gone (Event.Unmap).
	EventUnmap EventKind = abi.UFFD_EVENT_UNMAP
)

func (k EventKind) String() string {
	switch k {
	case EventPagefault:
		return "pagefault"
	case EventFork:
		return "fork"
	case EventRemap:
		return "remap"
	case EventRemove:
		return "remove"
	case EventUnmap:
		return "unmap"
	}
	return fmt.Sprintf("event %#x", uint8(k))
}

// FaultFlags tells the kinds of page faults apart.
type FaultFlags uint64

const (
	// FaultWrite: the thread wants to write.
	FaultWrite FaultFlags = abi.UFFD_PAGEFAULT_FLAG_WRITE

	// FaultWP: the page is there and write-protected.
	FaultWP FaultFlags = abi.UFFD_PAGEFAULT_FLAG_WP

	// FaultMinor: the page is in the page cache.
	FaultMinor FaultFlags = abi.UFFD_PAGEFAULT_FLAG_MINOR

	// FaultRWP: the page is there and protected against reading and writing.
	FaultRWP FaultFlags = abi.UFFD_PAGEFAULT_FLAG_RWP
)

// Event is one message of the kernel. Only the part that Kind names is filled in. It is a value, so that
// reading does not allocate.
type Event struct {
	Kind EventKind

	Pagefault struct {
		Addr     uint64 // start of the page; the exact address with FeatureExactAddress
		Flags    FaultFlags
		ThreadID uint32 // with FeatureThreadID, otherwise 0
	}
	Fork struct {
		FD int // the child's userfaultfd, new in this process; the reader owns it (FromFD) or closes it
	}
	Remap  struct{ From, To, Len uint64 }
	Remove struct{ Start, End uint64 }
	Unmap  struct{ Start, End uint64 }
}

// EventBuffer holds the messages of one Read. Each Read reuses it. Only one goroutine may use it at a
// time.
type EventBuffer struct {
	raw []byte
	n   int
}

// NewEventBuffer makes room for up to messages (at least 1) per read(2), 32 bytes each.
func NewEventBuffer(messages int) *EventBuffer {
	return &EventBuffer{raw: make([]byte, max(1, messages)*abi.Sizeof_uffd_msg)}
}

// Len is the number of messages of the last Read.
func (b *EventBuffer) Len() int { return b.n }

// At decodes message i, 0 <= i < Len. It panics if i is out of range, as a slice would.
func (b *EventBuffer) At(i int) Event {
	return decode(b.raw[:b.n*abi.Sizeof_uffd_msg][i*abi.Sizeof_uffd_msg:])
}

var opRead = func() *operation {
	op := newOperation("read")
	op.set(ErrWouldBlock)
	return op
}()

// Read makes one read(2) for as many messages as buf has room for, and returns how many it got. It waits for the
// first message; on a non-blocking descriptor it returns ErrWouldBlock instead. The kernel returns faults before
// other events. A thread whose fault was read may be running again already, woken by somebody else's Copy.
//
// The reader must keep reading: with the EVENT features, fork, mremap, munmap and madvise wait in the process until
// their event is read, and Copy returns ErrAgain until then.
func (u *UFFD) Read(buf *EventBuffer) (n int, err error) {
	buf.n = 0
	if !u.acquire() {
		return 0, opRead.closed
	}
	bytes, errno := readFD(u.fd, buf.raw)
	u.release()
	if errno != 0 {
		return 0, opRead.err(errno)
	}
	buf.n = bytes / abi.Sizeof_uffd_msg
	return buf.n, nil
}

// decode reads struct uffd_msg, which is in the machine's byte order.
func decode(m []byte) (e Event) {
	u64 := func(off int) uint64 { return binary.NativeEndian.Uint64(m[off:]) }
	u32 := func(off int) uint32 { return binary.NativeEndian.Uint32(m[off:]) }
	e.Kind = EventKind(m[abi.Offsetof_uffd_msg_event])
	switch e.Kind {
	case EventPagefault:
		e.Pagefault.Flags = FaultFlags(u64(abi.Offsetof_uffd_msg_arg_pagefault_flags))
		e.Pagefault.Addr = u64(abi.Offsetof_uffd_msg_arg_pagefault_address)
		e.Pagefault.ThreadID = u32(abi.Offsetof_uffd_msg_arg_pagefault_feat_ptid)
	case EventFork:
		e.Fork.FD = int(u32(abi.Offsetof_uffd_msg_arg_fork_ufd))
	case EventRemap:
		e.Remap.From = u64(abi.Offsetof_uffd_msg_arg_remap_from)
		e.Remap.To = u64(abi.Offsetof_uffd_msg_arg_remap_to)
		e.Remap.Len = u64(abi.Offsetof_uffd_msg_arg_remap_len)
	case EventRemove:
		e.Remove.Start = u64(abi.Offsetof_uffd_msg_arg_remove_start)
		e.Remove.End = u64(abi.Offsetof_uffd_msg_arg_remove_end)
	case EventUnmap: // the kernel fills in the same member as for remove
		e.Unmap.Start = u64(abi.Offsetof_uffd_msg_arg_remove_start)
		e.Unmap.End = u64(abi.Offsetof_uffd_msg_arg_remove_end)
	}
	return e
}
