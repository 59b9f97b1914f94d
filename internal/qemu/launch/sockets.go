// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
)

// checkUnused refuses a socket path at which another process listens, perhaps another VM: QEMU would take that path
// over.
func checkUnused(path string) error {
	conn, err := net.Dial("unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil // nobody listens; QEMU replaces a socket file that was left behind
	}
	if err != nil {
		return fmt.Errorf("where the destination's QEMU is to listen: %w", err)
	}
	conn.Close()
	return fmt.Errorf("another process listens at %s, where the destination's QEMU is to listen: "+
		"end it, or give the destination another path with a template", path)
}
