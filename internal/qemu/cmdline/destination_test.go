// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const (
	sourceQMP      = "/run/vm/qmp.sock"
	destinationQMP = "/run/new/qmp.sock"
	ourQMP         = "unix:" + destinationQMP + ",server=on,wait=off"
)

// fakeBinary puts a file with the name of a QEMU into PATH; it is never started.
func fakeBinary(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "qemu-system-test")
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":/usr/bin:/bin")
	return path
}

func TestDestination(t *testing.T) {
	binary := fakeBinary(t)
	for _, test := range []struct{ name, args, want string }{
		{"own socket", "-qmp unix:/run/vm/qmp.sock,server=on,wait=off -m 64", "-qmp " + ourQMP + " -m 64"},
		{"old spelling", "-qmp unix:/run/vm/qmp.sock,server,nowait", "-qmp " + ourQMP},
		{"pretty, waiting", "--qmp-pretty unix:/run/vm/../vm/qmp.sock,server=on", "-qmp " + ourQMP},
		{"relative socket", "-qmp unix:vm/qmp.sock,server=on", "-qmp " + ourQMP},
		{"other monitors", "-qmp unix:/a,server=on -monitor unix:/run/vm/qmp.sock2,server=on -qmp tcp:localhost:1,server=on",
			"-qmp unix:/a,server=on -monitor unix:/run/vm/qmp.sock2,server=on -qmp tcp:localhost:1,server=on -qmp " + ourQMP},
		{"chardev", "-chardev socket,id=mon,path=/run/vm/qmp.sock,server,nowait -mon chardev=mon,mode=control",
			"-chardev socket,id=mon,path=" + destinationQMP + ",server=on,wait=off -mon chardev=mon,mode=control"},
		{"chardev, short form", "-mon mon,mode=control -chardev socket,path=/run/vm/qmp.sock,id=mon,server=on,logfile=/l",
			"-mon mon,mode=control -chardev socket,id=mon,logfile=/l,path=" + destinationQMP + ",server=on,wait=off"},
		{"chardev of -qmp", "-chardev socket,id=c,path=/run/vm/qmp.sock,server=on -qmp chardev:c",
			"-chardev socket,id=c,path=" + destinationQMP + ",server=on,wait=off -qmp chardev:c"},
		{"readline monitor at another place",
			"-chardev socket,id=m,path=/m,server=on -mon m -qmp unix:/run/vm/qmp.sock,server",
			"-chardev socket,id=m,path=/m,server=on -mon m -qmp " + ourQMP},
		{"comma in a path", "-chardev socket,id=m,path=/a,,b,server=on -mon m,mode=control",
			"-chardev socket,id=m,path=/a,,b,server=on -mon m,mode=control -qmp " + ourQMP},
		{"no monitor", "-m 64", "-m 64 -qmp " + ourQMP},

		{"dropped",
			"-S -daemonize -incoming tcp:0:4444 -loadvm s -loadstate f --daemonize --incoming defer " +
				"-qmp unix:/run/vm/qmp.sock",
			"-qmp " + ourQMP},
		{"kept", "-pidfile /p -sandbox on,spawn=deny -runas nobody -D /log -usb disk.img -nographic -name a,process=b",
			"-pidfile /p -sandbox on,spawn=deny -runas nobody -D /log -usb disk.img -nographic -name a,process=b " +
				"-qmp " + ourQMP},
		{"flags that are not in all versions", "-async-teardown -daemonize -perfmap -S -jitdump -m 64",
			"-async-teardown -perfmap -jitdump -m 64 -qmp " + ourQMP},
		{"an option of a later version", "-later on -m 64", "-later on -m 64 -qmp " + ourQMP},
		{"values that look like options", "-append -S -name -daemonize -kernel -incoming",
			"-append -S -name -daemonize -kernel -incoming -qmp " + ourQMP},

		{"prealloc",
			`-mem-prealloc -object memory-backend-file,id=r,prealloc=on ` +
				`-object {"qom-type":"memory-backend-ram","prealloc":true}`,
			`-mem-prealloc -object memory-backend-file,id=r,prealloc=on ` +
				`-object {"qom-type":"memory-backend-ram","prealloc":true} -qmp ` + ourQMP},
		{"JSON of others", `-object {"qom-type":"secret","id":"r"} -blockdev {"driver":"null-co"}`,
			`-object {"qom-type":"secret","id":"r"} -blockdev {"driver":"null-co"} -qmp ` + ourQMP},
	} {
		t.Run(test.name, func(t *testing.T) {
			args := append([]string{"qemu-system-test"}, strings.Fields(test.args)...)
			got, err := Destination(
				Source{Args: args, QMPPath: sourceQMP, Dir: "/run"},
				Options{QMPPath: destinationQMP, Binaries: []string{"qemu-system-*"}},
			)
			if err != nil {
				t.Fatal(err)
			}
			want := append(append([]string{binary}, strings.Fields(test.want)...), "-S", "-incoming", "defer")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			// A destination becomes the source of the next migration.
			again, err := Destination(
				Source{Args: got, QMPPath: destinationQMP},
				Options{QMPPath: destinationQMP, Binaries: []string{binary}},
			)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(got, again); diff != "" {
				t.Errorf("a second time -first +second:\n%s", diff)
			}
		})
	}
}

func TestDestinationRefuses(t *testing.T) {
	fakeBinary(t)
	for name, test := range map[string]struct{ args, want string }{
		"empty":             {"", "is empty"},
		"other program":     {"sh -c true", "may be started"},
		"other path":        {"/usr/bin/../bin/sh -c true", "may be started"},
		"missing":           {"qemu-system-missing", "not on the destination"},
		"option unfinished": {"qemu-system-test -m", "lacks its value"},
		"tap descriptor":    {"qemu-system-test -netdev tap,fd=7,id=n", "open descriptors"},
		"chardev in JSON":   {`qemu-system-test -netdev {"type":"tap","fd":"7"}`, "open descriptors"},
		"add-fd":            {"qemu-system-test -add-fd fd=7,set=1", "open descriptors"},
		"preconfig":         {"qemu-system-test --preconfig", "preconfig"},
		"unknown option":    {"qemu-system-test -later -plugin x", "does not know QEMU's option -later"},
		"unknown, at end":   {"qemu-system-test -m 64 -later", "does not know QEMU's option -later"},
		"three dashes":      {"qemu-system-test ---plugin x", "---plugin is no option"},
		"only dashes":       {"qemu-system-test -- -plugin x", "-- is no option"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Destination(
				Source{Args: strings.Fields(test.args), QMPPath: sourceQMP},
				Options{QMPPath: destinationQMP, Binaries: []string{"qemu-system-*"}},
			)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q in it", err, test.want)
			}
		})
	}
}

func TestBinaryThatOthersCanChange(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "qemu-system-test")
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if found, err := FindBinary(path, []string{"qemu-system-*"}); err == nil {
		t.Errorf("%s would be started", found)
	}
}

// TestNoBinaries: a host whose list of binaries is empty starts none, for a command line or for a domain.
func TestNoBinaries(t *testing.T) {
	binary := fakeBinary(t)
	if err := MayRun(binary, []string{binary}); err != nil {
		t.Error(err)
	}
	if err := MayRun(binary, nil); !errors.Is(err, ErrNoBinaries) {
		t.Errorf("MayRun: %v", err)
	}
	args := []string{"qemu-system-test"}
	_, err := Destination(Source{Args: args, QMPPath: sourceQMP}, Options{QMPPath: destinationQMP})
	if !errors.Is(err, ErrNoBinaries) {
		t.Errorf("Destination: %v", err)
	}
}

func TestTemplate(t *testing.T) {
	binary := fakeBinary(t)
	source := Source{
		Name: "web", QMPPath: sourceQMP,
		Args: []string{"qemu-system-test", "-S", "-object", "memory-backend-file,id=r,mem-path=/dev/shm/r", "-append", "a b"},
	}
	for name, test := range map[string]struct {
		text string
		want []string // a first element with "!" is the text of an expected error
	}{
		"source's with changes": {
			"# another place for RAM\n{{range .Args}}{{replace \"/dev/shm\" \"/dev/hugepages\" .}}\n{{end}}-snapshot\n",
			[]string{
				"-object", "memory-backend-file,id=r,mem-path=/dev/hugepages/r", "-append", "a b", "-snapshot",
				"-qmp", ourQMP, "-S", "-incoming", "defer",
			},
		},
		"own": {
			"qemu-system-test\n  -name\r\n{{.Name}}\n\n-qmp\nunix:{{.QMP}},server=on,wait=off\n-incoming\ndefer\n",
			[]string{"-name", "web", "-qmp", ourQMP, "-S", "-incoming", "defer"},
		},
		"unknown field": {"{{.Nme}}", []string{"!Nme"}},
		"syntax":        {"{{", []string{"!template"}},
		"nothing":       {"# qemu\n", []string{"!no argument"}},
		"binary":        {"sh\n-c\n", []string{"!may be started"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "template")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := Destination(source, Options{
				QMPPath: destinationQMP, Template: "template", TemplateDir: filepath.Dir(path),
				Binaries: []string{"qemu-system-*"},
			})
			if text, fails := strings.CutPrefix(test.want[0], "!"); fails {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("error %v, want %q in it", err, text)
				}
				return
			}
			if diff := cmp.Diff(append([]string{binary}, test.want...), got); diff != "" || err != nil {
				t.Errorf("%v -want +got:\n%s", err, diff)
			}
		})
	}
}

func TestSettingsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		value := rapid.StringMatching(`[a-c=]{1,4}(,,?[a-c=]{1,4}){0,4}`).Draw(t, "value")
		if got := joinSettings(parseSettings(value)); got != value {
			t.Fatalf("%q became %q", value, got)
		}
	})
}

func TestGenerationIDStays(t *testing.T) {
	for _, c := range []struct{ device, want string }{
		{"vmgenid,guid=auto,id=g", "vmgenid,guid=ID,id=g"},
		{"driver=vmgenid,id=g,guid=auto", "driver=vmgenid,id=g,guid=ID"},
		{`{"driver":"vmgenid","guid":"auto"}`, `{"driver":"vmgenid","guid":"ID"}`},
		{"vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"},
		{"virtio-net,guid=auto", "virtio-net,guid=auto"},
	} {
		options := []option{{name: "device", value: c.device}}
		got, err := adapt(options, Source{GenerationID: "ID"}, Options{})
		if err != nil || got[0].value != c.want {
			t.Errorf("%s: %v, %v", c.device, got, err)
		}
		if got, err := adapt(options, Source{}, Options{}); err != nil || got[0].value != c.device {
			t.Errorf("%s, of an older source: %v, %v", c.device, got, err)
		}
	}
}
