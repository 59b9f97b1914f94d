// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Constants of the log, and functions of a start, for the tests.
const (
	LogSize = logSize
	OldLog  = oldLog
)

var (
	Listener      = listener
	MakePipe      = makePipe
	RemovePIDFile = removePIDFile
)

// LaunchAlone starts a QEMU whose output nobody reads.
func LaunchAlone(opts Options) (pid int, wait func() error, err error) {
	c, err := launch(opts)
	return c.pid, c.wait, err
}

// TakeAsShared has the file system of path count as one that several hosts can mount, until the test ends.
func TakeAsShared(t *testing.T, path string) {
	t.Helper()
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		t.Fatal(err)
	}
	if _, known := networkFileSystems[stat.Type]; !known {
		networkFileSystems[stat.Type] = true
		t.Cleanup(func() { delete(networkFileSystems, stat.Type) })
	}
}
