// SPDX-License-Identifier: Apache-2.0

package uffd

import "github.com/migrated-vm/migrated/pkg/uffd/internal/abi"

// WPMode says what WriteProtect does.
type WPMode uint64

const (
	// WPProtect protects; without it, WriteProtect lifts the protection and wakes the writers.
	WPProtect WPMode = abi.UFFDIO_WRITEPROTECT_MODE_WP

	// WPDontWake, when lifting, leaves the writers asleep until Wake. Not together with WPProtect.
	WPDontWake WPMode = abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
)

var opWriteProtect = newOperation("UFFDIO_WRITEPROTECT")

// WriteProtect protects the pages of r against writing, or lifts that (mode 0). r must be registered
// with ModeWP (ErrNotRegistered otherwise). It does all of r or fails; ErrAgain: read events, repeat.
func (u *UFFD) WriteProtect(r Range, mode WPMode) error {
	if !u.acquire() {
		return opWriteProtect.closed
	}
	arg := abi.UffdioWriteprotect{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_WRITEPROTECT, &arg)
	u.release()
	return opWriteProtect.err(errno)
}
