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
		{"-netdev stream,id=n,server=off,addr.type=unix,addr.path=/n", nil},
		{"-netdev dgram,id=n,local.type=unix,local.path=/n,remote.type=unix,remote.path=/r", []string{"/n"}},
		{"-append path=/x,server", nil},
		{"-serial mon:unix:/a,server=on", []string{"/a"}},
		{"-serial mon:stdio", nil},
		{"-monitor unix:/a,,b,server,nowait -qmp unix:c,,d,server=on", []string{"/a,b", "/dir/c,d"}},
		{"-display vnc=unix:/a,,b,lossy=on", []string{"/a,b"}},
		{"-display vnc=:1 -display gtk", nil},
		{"-vnc :1,websocket=on", nil},
		{"-vnc id=v,vnc=unix:/a", []string{"/a"}},
		{"-spice unix=on,addr=/a", []string{"/a"}},
		{"-spice addr=/a,unix", []string{"/a"}},
		{"-spice unix=on -spice addr=/a", []string{"/a", "/a"}}, // QEMU takes both together
		{"-spice addr=::1,port=1", nil},
		{`-netdev {"type":"stream","id":"n","server":true,"addr":{"type":"unix","path":"/a"}}`, []string{"/a"}},
		{`-netdev {"type":"stream","id":"n","addr":{"type":"unix","path":"/a"}}`, nil},
		{`-netdev {"type":"dgram","id":"n","local":{"type":"unix","path":"/a"}}`, []string{"/a"}},
		{`-netdev {"type":"user","id":"n","dnssearch":[{"str":"a"}]}`, nil},
		{`-netdev {} -vnc {} -device {'driver':'server'}`, nil},
		{"-chardev socket,id=c,path=/a,server=on -set chardev.c.path=/b,c", []string{"/b,c"}},
		{"-chardev socket,id=c,path=/a -set chardev.c.server=on -set chardev.d.path=/b", []string{"/a"}},
		{"-later -qmp unix:/a,server=on -other", []string{"/a"}},
		{"-chardev", nil},
	} {
		argv := append([]string{"qemu"}, strings.Fields(c.args)...)
		line, _ := Parse(argv) // a QEMU with a bad command line does not start, and has no sockets
		got, err := line.Sockets("/dir")
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", c.args, err, diff)
		}
	}
}

// TestSocketsInUnreadableJSON: QEMU takes these quotes.
func TestSocketsInUnreadableJSON(t *testing.T) {
	line, err := Parse([]string{"qemu", "-netdev", "{'type':'stream','server':true,'addr':{'type':'unix','path':'/a'}}"})
	if err != nil {
		t.Fatal(err)
	}
	if paths, err := line.Sockets("/"); err == nil || !strings.Contains(err.Error(), "JSON of QEMU's option -netdev") {
		t.Errorf("sockets %q, %v", paths, err)
	}
}

func TestFiles(t *testing.T) {
	for _, c := range []struct {
		args string
		want []string
	}{
		{"-serial file:a -monitor mon:file:/b,c", []string{"/dir/a", "/b,c"}},
		{"-chardev file,id=c,path=/a,,b -chardev file,path=/c,append=on,id=d", []string{"/a,b"}},
		{"-chardev backend=file,id=c,path=/a", []string{"/a"}},
		{"-chardev file,id=c,path=/a -set chardev.c.append=on", nil},
		{"-chardev socket,id=c,path=/a,logfile=/b -chardev null,id=d,logfile=/c,logappend=on", []string{"/b"}},
		{"-D a -pidfile /p -trace events=/e,file=/t", []string{"/dir/a", "/p", "/t"}},
		{"-object filter-dump,id=f,netdev=n,file=/a -object rng-random,id=r,filename=/dev/urandom", []string{"/a"}},
		{`-object {"qom-type":"filter-dump","id":"f","file":"/a"}`, []string{"/a"}},
		{"-serial /dev/ttyS0 -append file:x -vnc unix:b -drive file=/disk", nil},
	} {
		line, err := Parse(append([]string{"qemu"}, strings.Fields(c.args)...))
		if err != nil {
			t.Fatal(err)
		}
		got, err := line.Files("/dir")
		if err != nil {
			t.Errorf("%s: %v", c.args, err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.args, diff)
		}
	}
}

func TestMonitors(t *testing.T) {
	line, err := Parse(strings.Fields("qemu -qmp unix:a,,b,server=on -qmp-pretty unix:/c -qmp tcp::1,server=on " +
		"-monitor unix:/m,server=on -chardev socket,id=q,path=/q,server=on -mon q,mode=control " +
		"-chardev socket,id=r,path=/r,server=on -mon chardev=r -chardev socket,id=s,path=/s,server=on -qmp chardev:s"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/dir/a,b", "/q", "/s"}, line.Monitors("/dir")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
