// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
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
	itself := fmt.Sprintf("process %d (%s): look what it is for", os.Getpid(), process.Name(os.Getpid()))
	for _, name := range []string{path, strings.TrimPrefix(path, "/")} { // without its directory, QEMU starts in "/"
		_, _, err = qemu.Start(qemutest.Context(t), nil, launch.Options{
			Args:    []string{"/does/not/exist", "-serial", "unix:" + name + ",server=on,wait=off"},
			QMPPath: path + ".qmp", Dir: "/does/not/exist", PipePath: path + ".pipe", LogPath: path + ".log",
		})
		if err == nil || !strings.Contains(err.Error(), "another process listens at "+path) ||
			!strings.Contains(err.Error(), itself) {
			t.Errorf("%v, want %q in it", err, itself)
		}
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
}

// TestFileIsNotReplacedByASocket: QEMU removes whatever is where it is to listen. It is not started where that is no
// socket, but, for example, another VM's image.
func TestFileIsNotReplacedByASocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, []byte("a disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	opts := qemutest.Options(t, qemutest.Self(), "-serial", "unix:"+path+",server=on,wait=off")
	if _, _, err := qemu.Start(qemutest.Context(t), nil, opts); err == nil ||
		!strings.Contains(err.Error(), path+", where the destination's QEMU is to listen, is no socket") {
		t.Errorf("error %v", err)
	}
	if content, err := os.ReadFile(path); err != nil || string(content) != "a disk" {
		t.Errorf("the file has %q, %v", content, err)
	}
}

// TestNeighboursVMIsNamed checks that the refusal names the VM whose socket QEMU would take over, also if that receives
// datagrams. The QEMU there was given a relative path.
func TestNeighboursVMIsNamed(t *testing.T) {
	opts := qemutest.Options(t, qemutest.Self(), "-name", "web", "-serial", "unix:with blank,server=on,wait=off",
		"-netdev", "dgram,id=n,local.type=unix,local.path=datagrams,remote.type=unix,remote.path=/none")
	p, _ := qemutest.StartWith(t, nil, opts)
	want := fmt.Sprintf(`process %d (%s), which runs the VM "web"`, p.Pid(), process.Name(p.Pid()))
	for _, args := range [][]string{
		{"-serial", "unix:" + opts.Dir + "/with blank,server=on,wait=off"},
		{"-netdev", "dgram,id=n,local.type=unix,local.path=" + opts.Dir + "/datagrams"},
	} {
		_, _, err := qemu.Start(qemutest.Context(t), nil, qemutest.Options(t, qemutest.Self(), args...))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q in it", args, err, want)
		}
	}
}

// TestUnknownNeighbour: a socket that is open and in nobody's descriptors that can be seen is said to be unknown.
func TestUnknownNeighbour(t *testing.T) {
	if got := launch.Listener(filepath.Join(t.TempDir(), "none")); !strings.Contains(got, "not known which") {
		t.Errorf("%q", got)
	}
}
