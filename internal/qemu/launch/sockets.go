// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// CheckUnused refuses the path of a socket at which QEMU is to listen, if another process listens there, perhaps
// another VM: QEMU, or libvirt for it, would take that path over. Both remove whatever has that name. So CheckUnused
// refuses a path that is no socket, too, and a socket on a file system that hosts share: the one that listens there may
// be on another host.
func CheckUnused(path string) error {
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%s, where the destination's QEMU is to listen, is no socket, and QEMU would remove it: "+
			"move it away, or give the destination another path with a template", path)
	}
	conn, err := net.Dial("unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.ECONNREFUSED): // nobody at this host listens; QEMU replaces the file
		return checkNotShared(path)
	case errors.Is(err, syscall.EPROTOTYPE): // a process receives datagrams there
	case err != nil:
		return fmt.Errorf("where the destination's QEMU is to listen: %w", err)
	default:
		conn.Close()
	}
	return fmt.Errorf("another process listens at %s, where the destination's QEMU is to listen: %s: "+
		"look what it is for, and end it only if nobody needs it, or give the destination another path with a template",
		path, listener(path))
}

// listener says which process listens at a socket path at this moment.
func listener(path string) string {
	pids, err := process.Listeners(path)
	if err != nil {
		return fmt.Sprintf("it is not known which (%v)", err)
	}
	if len(pids) == 0 {
		return "it is not known which, as this daemon may not look into it"
	}
	var found []string
	for _, pid := range pids {
		found = append(found, process.Describe(pid))
	}
	return strings.Join(found, " and ")
}
