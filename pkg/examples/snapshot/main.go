// SPDX-License-Identifier: Apache-2.0

// Program snapshot lets a virtual machine run from a snapshot immediately. The monitor, such as Firecracker, loads no
// memory: this program answers its page faults from the snapshot's memory file.
//
//	snapshot SOCKET MEMORY-FILE
//
// The monitor connects to SOCKET and hands its userfaultfd over. The program ends when the monitor disconnects.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/handover"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: snapshot SOCKET MEMORY-FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "snapshot:", err)
		os.Exit(1)
	}
}

// run serves the first monitor that connects.
func run(socket, path string) error {
	memory, err := os.Open(path)
	if err != nil {
		return err
	}
	defer memory.Close()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	defer listener.Close()
	conn, err := listener.AcceptUnix()
	if err != nil {
		return err
	}
	defer conn.Close()
	vm, err := handover.Receive(context.Background(), conn, handover.PeerPolicy{UIDs: []uint32{uint32(os.Geteuid())}})
	if err != nil {
		return err
	}
	defer vm.UFFD.Close()

	waiter, err := uffd.NewWaiter(vm.UFFD)
	if err != nil {
		return err
	}
	defer waiter.Close()
	go func() {
		_, _ = conn.Read(make([]byte, 1)) // the monitor sends nothing: this returns when it disconnects
		_ = waiter.Interrupt()
	}()
	h := handler{vm: vm, memory: memory, messages: uffd.NewEventBuffer(64), given: map[uint64]bool{}}
	for {
		switch err := waiter.Wait(); {
		case errors.Is(err, uffd.ErrInterrupted):
			return nil
		case err != nil:
			return err
		}
		if err := h.answer(); err != nil {
			return err
		}
	}
}

// handler answers the faults of one virtual machine.
type handler struct {
	vm       *handover.Handover
	memory   *os.File
	messages *uffd.EventBuffer
	given    map[uint64]bool // addresses of pages that the guest gave up, by a balloon: they read as zeros now
}

// answer reads the messages that are waiting, and answers them.
func (h *handler) answer() error {
	n, err := h.vm.UFFD.Read(h.messages)
	if err != nil && !errors.Is(err, uffd.ErrWouldBlock) {
		return err
	}
	// Handle discarded pages first. The kernel returns faults before them, but discards the memory as soon as the
	// message is read.
	for i := range n {
		if m := h.messages.At(i); m.Kind == uffd.EventRemove {
			h.giveUp(m.Remove.Start, m.Remove.End)
		}
	}
	for i := range n {
		if m := h.messages.At(i); m.Kind == uffd.EventPagefault {
			if err := h.fill(m.Pagefault.Addr); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill installs the page at an address.
func (h *handler) fill(address uint64) error {
	for _, m := range h.vm.Mappings {
		if address < m.BaseHostVirtAddr || address-m.BaseHostVirtAddr >= m.Size {
			continue
		}
		offset := (address - m.BaseHostVirtAddr) / m.PageSize * m.PageSize
		at, page := m.BaseHostVirtAddr+offset, make([]byte, m.PageSize)
		if !h.given[at] {
			if _, err := h.memory.ReadAt(page, int64(m.Offset+offset)); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
		_, err := h.vm.UFFD.Copy(at, page, 0)
		// ErrExist: an earlier message was about the same page. ErrAgain: a message about discarded memory has to be read
		// first. Either way the thread repeats its access.
		if errors.Is(err, uffd.ErrExist) || errors.Is(err, uffd.ErrAgain) {
			return h.vm.UFFD.Wake(uffd.Range{Start: at, Len: m.PageSize})
		}
		return err
	}
	return fmt.Errorf("a fault at %#x, where the monitor said that there is no memory", address)
}

// giveUp records the pages that the guest gave up.
func (h *handler) giveUp(start, end uint64) {
	for _, m := range h.vm.Mappings {
		for at := max(start, m.BaseHostVirtAddr); at < min(end, m.BaseHostVirtAddr+m.Size); at += m.PageSize {
			h.given[at] = true
		}
	}
}
