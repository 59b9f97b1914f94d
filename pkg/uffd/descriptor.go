// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// descriptor owns a file descriptor that several goroutines may use at once. After close, the last of them closes it.
type descriptor struct {
	fd int

	// state counts the calls that are using fd. The bit closing is set once close was called.
	// From then on the count only falls, and the call that brings it to zero closes the descriptor.
	// So no call can use the number after the kernel gave it to another file.
	state atomic.Int64
}

const closing = 1 << 62

// close closes the descriptor once the calls that are under way have released it. It does not wait for them. A second
// close does nothing.
func (d *descriptor) close() error {
	for {
		s := d.state.Load()
		if s&closing != 0 {
			return nil
		}
		if d.state.CompareAndSwap(s, s|closing) {
			if s == 0 {
				return d.closeFD()
			}
			return nil
		}
	}
}

// closed reports whether close was called.
func (d *descriptor) closed() bool { return d.state.Load()&closing != 0 }

// acquire keeps the descriptor open until release. It returns false after close.
func (d *descriptor) acquire() bool {
	for {
		s := d.state.Load()
		if s&closing != 0 {
			return false
		}
		if d.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

func (d *descriptor) release() {
	if d.state.Add(-1) == closing {
		_ = d.closeFD()
	}
}

func (d *descriptor) closeFD() error {
	if err := unix.Close(d.fd); err != nil {
		return fmt.Errorf("close descriptor %d: %w", d.fd, err)
	}
	return nil
}
