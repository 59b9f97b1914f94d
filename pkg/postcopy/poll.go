// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/processors"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// poller waits for messages of several userfaultfds. Its worker sleeps in epoll_wait(2) itself: Go's poller would wake
// more threads than there is work for (docs/fault-budget.md). EPOLLEXCLUSIVE makes a message wake one worker.
type poller struct {
	epoll, bell int
	sleeper     processors.Sleeper
	ready       [pollBatch]unix.EpollEvent
}

const bell = -1 // in place of an index

func newPoller(uffds []*uffd.UFFD) (_ *poller, err error) {
	p := &poller{epoll: -1, bell: -1}
	processors.Add(1)
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	if p.bell, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	err = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, p.bell, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: bell})
	for i, u := range uffds {
		if err == nil {
			err = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, u.FD(), &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, Fd: int32(i)})
		}
	}
	if err != nil {
		return nil, fmt.Errorf("epoll_ctl: %w", err)
	}
	return p, nil
}

// wait returns the descriptors that have messages: Fd is the index, Events what they have. None after stop.
func (p *poller) wait() ([]unix.EpollEvent, error) {
	for {
		n, err := unix.EpollWait(p.epoll, p.ready[:], -1)
		p.sleeper.Woke()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("epoll_wait: %w", err)
		}
		for _, r := range p.ready[:n] {
			if r.Fd == bell {
				return nil, nil
			}
		}
		return p.ready[:n], nil
	}
}

// stop makes this and every later wait return nothing.
func (p *poller) stop() { _, _ = unix.Write(p.bell, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// close is for when nobody waits any more.
func (p *poller) close() {
	processors.Add(-1)
	for _, fd := range []int{p.epoll, p.bell} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
