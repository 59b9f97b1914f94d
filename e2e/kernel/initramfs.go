// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/migrated-vm/migrated/internal/cpio"
)

// File is one file of an initramfs: a directory if Mode says so, a symbolic link if Link is set, and otherwise a
// regular file.
type File struct {
	Name string      // "/init" and "init" are the same
	Mode fs.FileMode // of a regular file, 0 means that of Path, or 0o644
	Data []byte      // the content, or
	Path string      // the file on this machine with the content
	Link string      // target of a symbolic link
}

// Initramfs writes an initramfs of files into dir and returns its path. It adds /dev/console, which the kernel opens
// for /init, and the directories of the files. A name that is given twice is an error.
func Initramfs(dir string, files []File) (_ string, err error) {
	out, err := os.CreateTemp(dir, "initramfs-*.cpio")
	if err != nil {
		return "", err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			os.Remove(out.Name())
			err = fmt.Errorf("initramfs: %w", err)
		}
	}()
	b := bufio.NewWriterSize(out, 1<<20)
	fsys := &initramfs{w: cpio.NewWriter(b), names: map[string]bool{}}
	console := cpio.File{Name: "dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1}
	// Directories come first: a directory with a mode of its own must not have been made already for a file in it.
	for _, f := range files {
		if f.Mode.IsDir() {
			if err := fsys.addFile(f); err != nil {
				return "", err
			}
		}
	}
	if err := fsys.add(console); err != nil {
		return "", err
	}
	for _, f := range files {
		if !f.Mode.IsDir() {
			if err := fsys.addFile(f); err != nil {
				return "", err
			}
		}
	}
	if err := fsys.w.Close(); err != nil {
		return "", err
	}
	return out.Name(), b.Flush()
}

// initramfs is an archive in the making.
type initramfs struct {
	w     *cpio.Writer
	names map[string]bool // its content; true for a directory that was not in the list
}

// addFile adds one of the caller's files.
func (i *initramfs) addFile(f File) error {
	c := cpio.File{Name: strings.TrimPrefix(path.Clean("/"+f.Name), "/"), Mode: f.Mode, Data: f.Data}
	switch {
	case f.Mode.IsDir():
	case f.Link != "":
		c.Mode, c.Data = fs.ModeSymlink|0o777, []byte(f.Link)
	case f.Path != "":
		info, err := os.Stat(f.Path)
		if err != nil {
			return err
		}
		if c.Data, err = os.ReadFile(f.Path); err != nil {
			return err
		}
		if c.Mode == 0 {
			c.Mode = info.Mode().Perm()
		}
	case c.Mode == 0:
		c.Mode = 0o644
	}
	return i.add(c)
}

// add adds a file, and the directories above it that are missing.
func (i *initramfs) add(f cpio.File) error {
	if f.Name == "" {
		return errors.New("a file without a name")
	}
	if implied, there := i.names[f.Name]; there {
		if implied && f.Mode.IsDir() {
			return fmt.Errorf("%s must come before what is in it", f.Name)
		}
		return fmt.Errorf("%s is given twice", f.Name)
	}
	if dir := path.Dir(f.Name); dir != "." {
		if _, there := i.names[dir]; !there {
			if err := i.add(cpio.File{Name: dir, Mode: fs.ModeDir | 0o755}); err != nil {
				return err
			}
			i.names[dir] = true
		}
	}
	i.names[f.Name] = false
	return i.w.Write(f)
}
