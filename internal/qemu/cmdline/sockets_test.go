// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSockets(t *testing.T) {
	for _, c := range []struct {
		args string
		want []string
	}{
		{"-qmp unix:/a,server=on,wait=off -S", []string{"/a"}},
		{"-monitor unix:/a,server,nowait", []string{"/a"}},
		{"-serial unix:b", nil}, // QEMU connects to it
		{"-vnc unix:b", []string{"/dir/b"}},
		{"-chardev socket,id=c,path=/c,,d,server=yes", []string{"/c,d"}},
		{"-chardev socket,id=c,path=/c,server=off", nil},
		{"-chardev socket,id=c,host=::1,port=1,server=on", nil},
		{"-netdev stream,id=n,server=on,addr.type=unix,addr.path=/n", []string{"/n"}},
		{"-append path=/x,server", nil},
		{"-chardev", nil},
	} {
		argv := append([]string{"qemu"}, strings.Fields(c.args)...)
		line, _ := Parse(argv) // a QEMU with a bad command line does not start, and has no sockets
		if diff := cmp.Diff(c.want, line.Sockets("/dir")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.args, diff)
		}
	}
}
