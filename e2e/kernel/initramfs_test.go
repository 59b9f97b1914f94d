// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// cpio(1) unpacks the files that were given to Initramfs.
func TestInitramfs(t *testing.T) {
	need(t, "cpio")
	if os.Getuid() != 0 {
		testenv.CannotRun(t, "only root makes device nodes")
	}
	host := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(host, []byte("from the host"), 0o750); err != nil {
		t.Fatal(err)
	}
	initrd, err := Initramfs(t.TempDir(), []File{
		{Name: "/init", Mode: 0o755, Data: []byte("#!")},
		{Name: "etc/plain", Data: []byte("plain")},
		{Name: "usr/bin/tool", Path: host},
		{Name: "usr/bin/private", Path: host, Mode: 0o700},
		{Name: "lib64", Link: "usr/lib64"},
		{Name: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
	})
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	unpack := exec.Command("sh", "-c", `cpio --extract --quiet <"$0"`, initrd)
	unpack.Dir = root
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := map[string]string{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content := ""
		switch {
		case info.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = " " + string(b)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			content = " " + target
		}
		got[strings.TrimPrefix(path, root)] = info.Mode().String() + content
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"/dev":             "drwxr-xr-x",
		"/dev/console":     "Dcrw-------",
		"/etc":             "drwxr-xr-x",
		"/etc/plain":       "-rw-r--r-- plain",
		"/init":            "-rwxr-xr-x #!",
		"/lib64":           "Lrwxrwxrwx usr/lib64",
		"/tmp":             "dtrwxrwxrwx",
		"/usr":             "drwxr-xr-x",
		"/usr/bin":         "drwxr-xr-x",
		"/usr/bin/private": "-rwx------ from the host",
		"/usr/bin/tool":    "-rwxr-x--- from the host",
	}
	for name, w := range want {
		if got[name] != w {
			t.Errorf("%s: %q, want %q", name, got[name], w)
		}
		delete(got, name)
	}
	for name, g := range got {
		t.Errorf("%s: %q, which nobody asked for", name, g)
	}
}

func TestInitramfsRefuses(t *testing.T) {
	for what, files := range map[string][]File{
		"a name twice":        {{Name: "/a", Data: []byte("1")}, {Name: "a", Data: []byte("2")}},
		"no name":             {{Name: "/", Data: []byte("1")}},
		"a missing host file": {{Name: "a", Path: filepath.Join(t.TempDir(), "missing")}},
		"a late directory":    {{Name: "a/b", Mode: fs.ModeDir | 0o755}, {Name: "a", Mode: fs.ModeDir | 0o700}},
	} {
		dir := t.TempDir()
		if path, err := Initramfs(dir, files); err == nil {
			t.Errorf("%s: no error, but %s", what, path)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", what, left, err)
		}
	}
}
