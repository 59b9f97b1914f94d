// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Why Run ended before the last page was in. In every case the missing pages stay missing and registered: a thread that
// needs one waits, none reads a zero in its place, and Run may be called again.
var (
	// ErrLaneLost says that the connection to the source broke or was ended by it. It wraps the status
	// that the lane gave. Call Run with new lanes.
	ErrLaneLost = errors.New("a page lane to the source is lost")
	// ErrProtocol says that the source sent what no source should send: pages that were not asked for, that lie outside
	// of the RAM, or that are not whole. The source is broken, hostile or of another version.
	ErrProtocol = errors.New("the source broke the page protocol")
	// ErrProcessGone says that the process whose memory is filled has exited.
	ErrProcessGone = errors.New("the destination VM's process is gone")
	// ErrNoMemory says that the host has no memory for a page.
	ErrNoMemory = errors.New("no memory for the VM's pages: enlarge the tmpfs (mount -o remount,size=), " +
		"the pool of huge pages (vm.nr_hugepages) or the memory limit of the VM's cgroup")
	// ErrRangeGone says that memory is not there any more, or not registered any more, and no event said so.
	ErrRangeGone = errors.New("memory of the destination VM vanished without notice")
	// ErrMoved says that the process moved its RAM (mremap). Pages cannot be found there any more.
	ErrMoved = errors.New("the destination VM's process moved its RAM (mremap): " +
		"the migration cannot be completed; end that process")
	// ErrForeignFault says that a descriptor reports faults of memory that is in no block: the thread would wait for
	// ever.
	ErrForeignFault = errors.New("fault outside of all RAM blocks: give all memory that is registered with the descriptor")
	// ErrState says that Options.State is not a table of these blocks: it is of another VM or version, or damaged.
	ErrState = errors.New("the kept page states are not those of this VM's RAM blocks")
	// ErrRunning says that Run is already under way.
	ErrRunning = errors.New("the post-copy engine runs already")
)

// ForkError says that the process forked, and that its child would share RAM that is incomplete. QEMU's RAM is
// MADV_DONTFORK, so the process is another program, or another QEMU.
type ForkError struct {
	// Child is the userfaultfd of the child's memory. While it is open the child waits where it needs a
	// missing page; if it closes, the child reads zeros there, and the kernel puts these into the
	// shared RAM. So end the child, then close it.
	Child *uffd.UFFD
	// More are the userfaultfds of its other children. The same is true of each of them.
	More []*uffd.UFFD
}

func (e *ForkError) Error() string {
	return fmt.Sprintf("the destination VM's process forked while its RAM was incomplete "+
		"(the child's userfaultfd is descriptor %d): end the child process", e.Child.FD())
}

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}
