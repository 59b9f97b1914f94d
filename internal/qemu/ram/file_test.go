// SPDX-License-Identifier: Apache-2.0

package ram_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
)

// TestRAMFiles checks that of everything that QEMU leaves behind, only RAM in a file with a name is found.
func TestRAMFiles(t *testing.T) {
	mine, pmem := qemutest.RAMFile(t), qemutest.RAMFile(t)
	file := func(id, path string, more string) []string {
		return []string{"-object", fmt.Sprintf("memory-backend-file,id=%s,size=32M,mem-path=%s,%s", id, path, more)}
	}
	args := []string{"-machine", "nvdimm=on,memory-backend=ram0", "-m", "32M,slots=4,maxmem=1G"}
	args = append(args, file("ram0", mine, "share=on")...)
	args = append(args, file("dir", "/dev/shm", "share=on")...)
	args = append(args, file("private", qemutest.RAMFile(t), "share=off")...)
	args = append(args, file("image", pmem, "share=on")...)
	args = append(args,
		"-device", "pc-dimm,memdev=dir", "-device", "pc-dimm,memdev=private", "-device", "nvdimm,memdev=image")
	p, vm := qemutest.Start(t, args...)
	blocks, err := vm.RAM.Blocks(qemutest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	files, err := vm.RAM.Files(qemutest.Context(t), blocks)
	if err != nil || len(files) != 2 {
		t.Fatalf("files %+v, %v", files, err)
	}
	for _, f := range files {
		switch {
		case f.Path == mine && f.Keep == "":
			if err := f.Remove(); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", vm.Pid)) {
				t.Errorf("while QEMU runs: %v", err)
			}
		case f.Path == pmem && strings.Contains(f.Keep, "nvdimm"):
		default:
			t.Errorf("file %+v", f)
		}
	}
	if err := vm.Quit(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	for _, f := range files {
		err := f.Remove()
		_, stat := os.Stat(f.Path)
		if removed := errors.Is(stat, fs.ErrNotExist); removed != (f.Path == mine) || (err == nil) != removed {
			t.Errorf("%s is removed: %v; %v", f.Path, removed, err)
		}
	}
}

// TestRemoveRAMFile checks that a file stays unless it certainly belongs to the VM alone.
func TestRemoveRAMFile(t *testing.T) {
	disk, err := os.MkdirTemp("/var/tmp", "migrated-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(disk)
	for name, c := range map[string]struct {
		dir  string
		do   func(t *testing.T, path string)
		want string // empty: it is removed
	}{
		"its own":      {"/dev/shm", func(*testing.T, string) {}, ""},
		"gone already": {"/dev/shm", func(t *testing.T, path string) { must(t, os.Remove(path)) }, ""},
		"another file": {"/dev/shm", func(t *testing.T, path string) {
			must(t, errors.Join(os.Rename(path, path+".first"), os.WriteFile(path, nil, 0o600)))
			t.Cleanup(func() { _ = os.Remove(path + ".first") })
		}, "another file"},
		"a link to it": {"/dev/shm", func(t *testing.T, path string) {
			must(t, errors.Join(os.Rename(path, path+".first"), os.Symlink(path+".first", path)))
			t.Cleanup(func() { _ = os.Remove(path + ".first") })
		}, "too many levels"},
		"two names": {"/dev/shm", func(t *testing.T, path string) {
			must(t, os.Link(path, path+".second"))
			t.Cleanup(func() { _ = os.Remove(path + ".second") })
		}, "other names"},
		"open elsewhere": {"/dev/shm", func(t *testing.T, path string) {
			f, err := os.Open(path)
			must(t, err)
			t.Cleanup(func() { _ = f.Close() })
		}, "another process has it open or mapped"},
		"mapped elsewhere": {"/dev/shm", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			must(t, err)
			m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
			must(t, errors.Join(err, f.Close()))
			t.Cleanup(func() { _ = unix.Munmap(m) })
		}, fmt.Sprintf("process %d has it open or mapped", os.Getpid())},
		"on a disk": {disk, func(*testing.T, string) {}, "on a disk"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(c.dir, fmt.Sprintf("migrated-test-%d", os.Getpid()))
			must(t, os.WriteFile(path, make([]byte, 4096), 0o600))
			t.Cleanup(func() { _ = os.Remove(path) })
			var st unix.Stat_t
			must(t, unix.Stat(path, &st))
			if c.dir == disk {
				if out, err := exec.Command("stat", "-f", "-c", "%T", disk).Output(); err != nil ||
					strings.TrimSpace(string(out)) == "tmpfs" {
					t.Skipf("%s is %s, %v", disk, out, err)
				}
			}
			c.do(t, path)
			err := ram.File{Path: path, Device: st.Dev, Inode: st.Ino}.Remove()
			_, stat := os.Lstat(path)
			if c.want == "" && (err != nil || !errors.Is(stat, fs.ErrNotExist)) {
				t.Errorf("it stays: %v, %v", err, stat)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || stat != nil) {
				t.Errorf("%v, want %q; %v", err, c.want, stat)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
