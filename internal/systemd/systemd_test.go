// SPDX-License-Identifier: Apache-2.0

package systemd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// manager returns a service manager's end of sd_notify(3).
func manager(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv(socketVariable, path)
	return conn
}

// told returns the next message, and the descriptors that came with it.
func told(t *testing.T, conn *net.UnixConn) (message string, files []*os.File) {
	t.Helper()
	text, oob := make([]byte, 256), make([]byte, 256)
	n, oobn, _, _, err := conn.ReadMsgUnix(text, oob)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	return string(text[:n]), files
}

// TestKeptSocketAccepts: a kept socket outlives the daemon that opened it. The next daemon accepts connections that
// were made in between.
func TestKeptSocketAccepts(t *testing.T) {
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s")} {
		t.Run(network, func(t *testing.T) {
			conn := manager(t)
			first, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			if u, ok := first.(*net.UnixListener); ok {
				u.SetUnlinkOnClose(false)
			}
			address := first.Addr().String()
			if kept, err := Keep("name", first.(syscall.Conn)); !kept || err != nil {
				t.Fatal(kept, err)
			}
			message, files := told(t, conn)
			if want := "FDSTORE=1\nFDNAME=name"; message != want || len(files) != 1 {
				t.Fatalf("%q with %d descriptors, want %q", message, len(files), want)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			caller, err := net.Dial(network, address) // nobody accepts
			if err != nil {
				t.Fatal(err)
			}
			defer caller.Close()
			inherited := &Listeners{files}
			second := inherited.Take(network, address)
			if second == nil {
				t.Fatal("it was not taken")
			}
			defer second.Close()
			accepted, err := second.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			if rest := inherited.Rest(); len(rest) != 0 {
				t.Errorf("left over: %v", rest)
			}
		})
	}
}

// TestOthersAreNotTaken: descriptors that do not listen at the address are not taken.
func TestOthersAreNotTaken(t *testing.T) {
	const address = "127.0.0.1:0"
	path := filepath.Join(t.TempDir(), "s")
	for name, c := range map[string]struct {
		make func() (*os.File, error)
		want [2]string
	}{
		"another port": {func() (*os.File, error) {
			return fileOf(net.Listen("tcp", address))
		}, [2]string{"tcp", "127.0.0.1:1"}},
		"a connection's end": {func() (*os.File, error) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return os.NewFile(uintptr(fds[0]), "x"), errors.Join(err, unix.Close(fds[1]))
		}, [2]string{"unix", ""}},
		"no socket": {func() (*os.File, error) { return os.Open("/dev/null") }, [2]string{"tcp", address}},
		"a socket that nobody finds": {func() (*os.File, error) {
			f, err := fileOf(net.Listen("unix", path))
			return f, errors.Join(err, os.Remove(path))
		}, [2]string{"unix", path}},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := c.make()
			if err != nil {
				t.Fatal(err)
			}
			inherited := &Listeners{[]*os.File{f}}
			if l := inherited.Take(c.want[0], c.want[1]); l != nil {
				t.Errorf("%v was taken", l.Addr())
			}
			if rest := inherited.Rest(); len(rest) != 1 {
				t.Errorf("left over: %v", rest)
			}
			if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("it is still open: %v", err)
			}
		})
	}
}

// fileOf returns a duplicate of a listener's descriptor. The listener itself stays open until the test's process ends.
func fileOf(l net.Listener, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	return l.(interface{ File() (*os.File, error) }).File()
}

func TestWildcard(t *testing.T) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string]bool{":" + port: true, "[::]:" + port: true, "127.0.0.1:" + port: false} {
		if got := listensAt(l, "tcp", address); got != want {
			t.Errorf("%v listens at %s: %t", l.Addr(), address, got)
		}
	}
}

func TestWithoutManager(t *testing.T) {
	t.Setenv(socketVariable, "")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if kept, err := Keep("name", l.(syscall.Conn)); kept || err != nil {
		t.Error(kept, err)
	}
	if err := errors.Join(Notify("READY=1"), Forget("name")); err != nil {
		t.Error(err)
	}
	t.Setenv(socketVariable, filepath.Join(t.TempDir(), "nobody"))
	if kept, err := Keep("name", l.(syscall.Conn)); kept || err == nil {
		t.Error(kept, err)
	}
}
