// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"errors"
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

// TestSharedFilesStay: where hosts share the VM's directory, the files there may be those of the QEMU that runs the VM
// on another host. A socket of another host refuses connections, like one that was left behind.
func TestSharedFilesStay(t *testing.T) {
	dir := t.TempDir()
	elsewhere, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere.SetUnlinkOnClose(false)
	err = errors.Join(elsewhere.Close(), os.WriteFile(filepath.Join(dir, "log"), []byte("so far"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	start := func(args ...string) error {
		opts := qemutest.Options(t, qemutest.Self(), args...)
		opts.Dir = dir
		p, vm, err := qemu.Start(qemutest.Context(t), nil, opts)
		if err == nil {
			err = errors.Join(vm.Close(), p.Kill(qemutest.Context(t)))
		}
		return err
	}
	t.Run("shared", func(t *testing.T) {
		launch.TakeAsShared(t, dir)
		for _, args := range [][]string{
			{"-serial", "unix:socket,server=on,wait=off"}, {"-serial", "file:log"}, {"-D", "log"}, {"-pidfile", dir + "/log"},
			{"-chardev", "file,id=c,path=log"}, {"-chardev", "null,id=c,logfile=log"},
		} {
			if err := start(args...); err == nil || !strings.Contains(err.Error(), "is on a file system that hosts share") {
				t.Errorf("%q: %v", args, err)
			}
		}
		if content, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || string(content) != "so far" {
			t.Errorf("the file has %q, %v", content, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "socket")); err != nil {
			t.Error(err)
		}
		if err := start("-chardev", "file,id=c,path=log,append=on", "-serial", "file:new"); err != nil {
			t.Errorf("a file that QEMU does not empty, and a new one: %v", err)
		}
	})
	if err := start("-serial", "unix:socket,server=on,wait=off", "-D", "log"); err != nil {
		t.Errorf("files of this host alone: %v", err)
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
