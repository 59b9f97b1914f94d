// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestListensAt(t *testing.T) {
	for _, c := range []struct {
		args string
		want []string
	}{
		{"-qmp unix:/a,server=on,wait=off -S", []string{"/a"}},
		{"-monitor unix:/a,server,nowait", []string{"/a"}},
		{"-serial unix:b", nil}, // it connects
		{"-vnc unix:b", []string{"/dir/b"}},
		{"-chardev socket,id=c,path=/c,,d,server=yes", []string{"/c,d"}},
		{"-chardev socket,id=c,path=/c,server=off", nil},
		{"-chardev socket,id=c,host=::1,port=1,server=on", nil},
		{"-netdev stream,id=n,server=on,addr.type=unix,addr.path=/n", []string{"/n"}},
		{"-append path=/x,server", nil},
		{"-chardev", nil},
	} {
		argv := append([]string{"qemu"}, strings.Fields(c.args)...)
		if diff := cmp.Diff(c.want, listensAt(argv, "/dir")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.args, diff)
		}
	}
}

// TestNeighboursSocketStays: QEMU is not started where it would take a socket's name away.
func TestNeighboursSocketStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "neighbour")
	neighbour, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer neighbour.Close()
	_, _, err = Start(testContext(t), StartOptions{
		Args: []string{"/does/not/exist", "-serial", "unix:" + path + ",server=on,wait=off"}, QMPPath: path + ".qmp", Dir: "/",
		PipePath: path + ".pipe", LogPath: path + ".log",
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
