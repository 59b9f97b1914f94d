// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// TestNeighboursSocketStays checks that QEMU is not started if it would take over the socket path of another process.
func TestNeighboursSocketStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "neighbour")
	neighbour, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer neighbour.Close()
	_, _, err = qemu.Start(qemutest.Context(t), nil, launch.Options{
		Args:    []string{"/does/not/exist", "-serial", "unix:" + path + ",server=on,wait=off"},
		QMPPath: path + ".qmp", Dir: "/", PipePath: path + ".pipe", LogPath: path + ".log",
	})
	if err == nil || !strings.Contains(err.Error(), "another process listens at "+path) {
		t.Errorf("%v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
}
