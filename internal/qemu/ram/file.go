// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/qom"
)

// A File is a file in memory that holds RAM of a VM and that QEMU leaves behind when it ends. It comes from -object
// memory-backend-file,share=on whose mem-path names a file. If mem-path names a directory, QEMU has already unlinked
// its file.
type File struct {
	Path   string `json:"path"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	// Keep says why the file must stay after QEMU's end; empty: nobody else is known to need it.
	Keep string `json:"keep,omitempty"`
}

// Files returns the files of the VM's blocks.
func (mem *Memory) Files(ctx context.Context, blocks []Block) ([]File, error) {
	blocks = slices.DeleteFunc(slices.Clone(blocks), func(b Block) bool {
		return b.Private || b.ReadOnly || b.Path == "" || !b.IsBackend() ||
			strings.HasSuffix(b.File, " (deleted)") || !filepath.IsAbs(b.File)
	})
	if len(blocks) == 0 {
		return nil, nil
	}
	stores, err := mem.stores(ctx)
	if err != nil {
		return nil, err
	}
	var files []File
	for _, b := range blocks {
		var st unix.Stat_t
		if err := unix.Stat(b.Path, &st); err != nil {
			return nil, fmt.Errorf("RAM %q: its file %s: %w", b.ID, b.File, err)
		}
		f := File{Path: b.File, Device: st.Dev, Inode: st.Ino}
		switch {
		case stores[b.backend] != "":
			f.Keep = stores[b.backend]
		case b.FileOffset != 0 || uint64(st.Size) > b.maxSize:
			f.Keep = "it holds more than this memory"
		}
		files = append(files, f)
	}
	return files, nil
}

// stores returns the memory backends that hold more than a VM's RAM: a description of their content by id.
func (mem *Memory) stores(ctx context.Context) (map[string]string, error) {
	stores := map[string]string{}
	var devices []struct {
		Type string `json:"type"`
		Data struct {
			Memdev string `json:"memdev"`
		} `json:"data"`
	}
	if err := mem.qmp.Do(ctx, "query-memory-devices", nil, &devices); err != nil {
		return nil, err
	}
	for _, d := range devices {
		if d.Type != "dimm" && d.Type != "virtio-mem" {
			stores[strings.TrimPrefix(d.Data.Memdev, "/objects/")] = "it is the image of a device of type " + d.Type
		}
	}
	given, err := qom.Devices(ctx, mem.qmp)
	if err != nil {
		return nil, err
	}
	for _, d := range given {
		if !strings.HasPrefix(d.Class(), "ivshmem") {
			continue
		}
		var memdev string
		if err := qom.Property(ctx, mem.qmp, d.Path, "memdev", &memdev); err != nil {
			return nil, err
		}
		stores[strings.TrimPrefix(memdev, "/objects/")] = "it is shared by an ivshmem device"
	}
	return stores, nil
}

// errNotRemoved is wrapped by every error that explains why a file stays.
var errNotRemoved = errors.New("it was not removed")

// Remove removes the file once its QEMU has ended, or returns an error that says why the file stays. It removes only a
// file in memory that is certainly the one that QEMU had, has no other name, and is neither open nor mapped in another
// process. The kernel proves the last point with a lease on the file (F_SETLEASE in fcntl(2)), which also keeps others
// from opening it until it is gone.
func (r File) Remove() error {
	if r.Keep != "" {
		return fmt.Errorf("%w: %s", errNotRemoved, r.Keep)
	}
	fd, err := unix.Open(r.Path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // already removed
	}
	if err != nil {
		return fmt.Errorf("%w: open it: %w", errNotRemoved, err)
	}
	f := os.NewFile(uintptr(fd), r.Path)
	defer f.Close()
	if err := r.check(f); err != nil {
		return fmt.Errorf("%w: %w", errNotRemoved, err)
	}
	if err := lease(f); err != nil {
		return fmt.Errorf("%w: %w", errNotRemoved, err)
	}
	if err := r.checkName(f); err != nil {
		return fmt.Errorf("%w: %w", errNotRemoved, err)
	}
	if err := unix.Unlink(r.Path); err != nil {
		return fmt.Errorf("%w: %w", errNotRemoved, err)
	}
	return nil
}

// check refuses an open file that is not certainly the VM's RAM alone.
func (r File) check(f *os.File) error {
	var st unix.Stat_t
	var system unix.Statfs_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &st), unix.Fstatfs(int(f.Fd()), &system)); err != nil {
		return err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Dev != r.Device || st.Ino != r.Inode:
		return errors.New("it is another file than the VM's by now")
	case st.Nlink != 1:
		return errors.New("it has other names, too")
	case system.Type != unix.TMPFS_MAGIC && system.Type != unix.HUGETLBFS_MAGIC:
		return errors.New("it is on a disk, and takes no memory")
	}
	return nil
}

// checkName returns an error unless the path still leads to the open file.
func (r File) checkName(f *os.File) error {
	ours, err := f.Stat()
	if err != nil {
		return err
	}
	named, err := os.Lstat(r.Path)
	if err != nil {
		return err
	}
	if !os.SameFile(ours, named) {
		return errors.New("it is another file than the VM's by now")
	}
	return nil
}

// lease returns an error if another process has the file open or mapped.
func lease(f *os.File) error {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	switch {
	case errors.Is(err, unix.EAGAIN):
		if who := holders(f); len(who) > 0 {
			return fmt.Errorf("process %s has it open or mapped", strings.Join(who, ", "))
		}
		return errors.New("another process has it open or mapped")
	case err != nil:
		return fmt.Errorf("whether another process uses it cannot be told (fcntl F_SETLEASE: %w)", err)
	}
	return nil
}

// holders returns the PIDs of processes that map a file, as far as they are visible. It does not find processes that
// only have the file open.
func holders(f *os.File) (pids []string) {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return nil
	}
	key := mapKey(unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	_, _ = eachMaps(func(pid int, text []byte) { // the processes that it cannot see do not matter here
		if mapsFile(text, key) {
			pids = append(pids, strconv.Itoa(pid))
		}
	})
	return pids
}
