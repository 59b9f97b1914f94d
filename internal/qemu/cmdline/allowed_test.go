// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReadTemplate reads names that another host may send, and checks that only templates are read.
func TestReadTemplate(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "templates")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		filepath.Join(parent, "secret"): "root:secret", filepath.Join(dir, "good"): "qemu",
		filepath.Join(dir, "long"): strings.Repeat("x", maxTemplate+1),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{
		"out": "../secret", "absolute": filepath.Join(parent, "secret"), "zero": "/dev/zero", "in": "good",
	} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"good", "in", filepath.Join(dir, "good")} {
		if text, err := readTemplate(dir, name); err != nil || text != "qemu" {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
	for _, name := range []string{
		"", ".", "..", "../secret", "a/../../secret", filepath.Join(parent, "secret"), dir + "/../secret", "/dev/zero",
		"out", "absolute", "zero", "fifo", "long", "none", "good\x00", "\xff", strings.Repeat("n", 65),
	} {
		if text, err := readTemplate(dir, name); err == nil || strings.Contains(err.Error(), "root:") {
			t.Errorf("%q: %.20q, %v", name, text, err)
		}
	}
	if _, err := readTemplate("", "good"); err == nil {
		t.Error("a host without a directory has templates")
	}
}

func TestForbidden(t *testing.T) {
	for _, test := range []struct {
		entry, args string
		refused     bool
	}{
		{"plugin", "-plugin\nfile=/tmp/x.so", true},
		{"plugin", "--plugin\nfile=/tmp/x.so", true},
		{"plugin", "-append\n-plugin", false},
		{"plugin", "-async-teardown\n-plugin\nfile=/tmp/x.so", true},
		{"plugin", "-perfmap\n-plugin\nfile=/tmp/x.so", true},
		{"plugin", "-jitdump\n-plugin\nfile=/tmp/x.so", true},
		{"netdev script", "-netdev\ntap,id=a,script=/tmp/x", true},
		{"netdev script", "-netdev\ntap,id=a,script=no", false},
		{"netdev script", "-netdev\ntap,id=a,script=no,script=/tmp/x", true},
		{"netdev script", "-netdev\ntap,id=a,downscript=/tmp/x", false},
		{"netdev script", "-netdev\n" + `{"type":"tap","id":"a","script":"/tmp/x"}`, true},
		{"netdev script", "-netdev\n" + `{"type":"tap","id":"a","script":"no"}`, false},
		{"netdev script", "-netdev\n" + `{"type":"tap","id":"a",'script':'/tmp/x'}`, true}, // QEMU accepts these quotes
		{"netdev script", "-chardev\nfile,id=a,path=/x,script=y", false},
		{"netdev script", "-netdev\ntap,id=a,script", true},   // QEMU runs "on"
		{"netdev script", "-netdev\ntap,id=a,noscript", true}, // and "off"
		{"netdev script", "-netdev\ntap,id=a\n-set\nnetdev.a.script=/tmp/x", true},
		{"netdev script", "-netdev\ntap,id=a\n--set\nnetdev.a.script=/tmp/x,y=no", true},
		{"netdev script", "-netdev\ntap,id=a\n-set\nnetdev.a.script=no", false},
		{"netdev script", "-netdev\ntap,id=a\n-set\nnetdev.a.ifname=script=x", false},
		{"netdev script", "-chardev\nfile,id=a,path=/x\n-set\nchardev.a.script=y", false},
		{"fsdev", "-set\nfsdev.a.path=/", true},
		{"set", "-set\nfsdev.a.path=/", true},
	} {
		options, err := parseOptions(strings.Split(test.args, "\n"))
		if err != nil {
			t.Fatal(err)
		}
		var refused *ForbiddenError
		if err := checkForbidden(options, []string{test.entry}); errors.As(err, &refused) != test.refused {
			t.Errorf("%q and %q: %v", test.entry, test.args, err)
		}
	}
}

// FuzzTemplateName checks that any name from a peer reads a file of the directory or nothing.
func FuzzTemplateName(f *testing.F) {
	parent := f.TempDir()
	dir := filepath.Join(parent, "templates")
	if err := os.Mkdir(dir, 0o755); err != nil {
		f.Fatal(err)
	}
	for path, text := range map[string]string{
		filepath.Join(parent, "secret"): "secret", filepath.Join(dir, "good"): "good",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	for _, seed := range []string{"good", "../secret", "/dev/null", dir + "/good", dir + "/../secret", "\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if text, err := readTemplate(dir, name); err == nil && text != "good" {
			t.Errorf("%q reads %q", name, text)
		}
	})
}
