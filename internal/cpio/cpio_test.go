// SPDX-License-Identifier: Apache-2.0

package cpio

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// tree has one file of each type, and contents of each length modulo four.
var tree = []File{
	{Name: "dir", Mode: fs.ModeDir | 0o755},
	{Name: "dir/empty", Mode: 0o600},
	{Name: "dir/1", Mode: 0o644, Data: []byte("1")},
	{Name: "dir/22", Mode: 0o755, Data: []byte("22")},
	{Name: "dir/333", Mode: fs.ModeSetgid | 0o755, Data: []byte("333")},
	{Name: "dir/4444", Mode: fs.ModeSetuid | 0o755, Data: []byte("4444")},
	{Name: "sticky", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
	{Name: "link", Mode: fs.ModeSymlink | 0o777, Data: []byte("dir/4444")},
	{Name: "console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1},
	{Name: "disk", Mode: fs.ModeDevice | 0o660, Major: 254, Minor: 3},
}

func archive(t *testing.T, files []File) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	for _, f := range files {
		if err := w.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestUnpacked: cpio(1) unpacks an archive into the same files.
func TestUnpacked(t *testing.T) {
	_, err := exec.LookPath("cpio")
	if err == nil && os.Getuid() != 0 {
		err = errors.New("only root makes device nodes")
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	cmd := exec.Command("cpio", "--extract", "--quiet")
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(archive(t, tree))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, f := range tree {
		path := filepath.Join(dir, f.Name)
		info, err := os.Lstat(path)
		if err != nil {
			t.Error(err)
			continue
		}
		if info.Mode() != f.Mode {
			t.Errorf("%s has mode %v, want %v", f.Name, info.Mode(), f.Mode)
		}
		switch {
		case f.Mode.IsRegular():
			if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, f.Data) {
				t.Errorf("%s has %q (%v), want %q", f.Name, data, err, f.Data)
			}
		case f.Mode.Type() == fs.ModeSymlink:
			if target, err := os.Readlink(path); err != nil || target != string(f.Data) {
				t.Errorf("%s leads to %q (%v), want %q", f.Name, target, err, f.Data)
			}
		case f.Mode&fs.ModeDevice != 0:
			if stat, ok := info.Sys().(*syscall.Stat_t); !ok || stat.Rdev != uint64(f.Major<<8|f.Minor) {
				t.Errorf("%s is device %#x, want %d:%d", f.Name, stat.Rdev, f.Major, f.Minor)
			}
		}
	}
}

func TestSameFilesSameArchive(t *testing.T) {
	if !bytes.Equal(archive(t, tree), archive(t, tree)) {
		t.Error("two archives of the same files differ")
	}
}

func TestRefusesWhatItCannotStore(t *testing.T) {
	var b bytes.Buffer
	if err := NewWriter(&b).Write(File{Name: "s", Mode: fs.ModeSocket}); err == nil {
		t.Error("a socket was archived")
	}
	if b.Len() != 0 {
		t.Errorf("%d bytes were written for it", b.Len())
	}
}

func TestReportsWriteErrors(t *testing.T) {
	full := errors.New("full")
	for size := range len(archive(t, tree)) {
		w := NewWriter(&limited{size: size, err: full})
		var err error
		for _, f := range tree {
			if err = w.Write(f); err != nil {
				break
			}
		}
		if err == nil {
			err = w.Close()
		}
		if !errors.Is(err, full) {
			t.Fatalf("with room for %d bytes: %v", size, err)
		}
	}
}

// limited is a writer that fails after size bytes.
type limited struct {
	size int
	err  error
}

func (l *limited) Write(b []byte) (int, error) {
	if len(b) > l.size {
		return l.size, l.err
	}
	l.size -= len(b)
	return len(b), nil
}
