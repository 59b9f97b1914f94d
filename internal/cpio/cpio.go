// SPDX-License-Identifier: Apache-2.0

// Package cpio writes archives that a Linux kernel unpacks as its initramfs, in
// the "newc" format, which the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst describes. Each
// file has a header of 13 hexadecimal fields, its name and its content, each
// padded to four bytes.
package cpio

import (
	"fmt"
	"io"
	"io/fs"
)

// File is one file of an archive.
type File struct {
	// Name is the path without a leading slash. A directory must come before
	// what is in it.
	Name string
	// Mode has the permissions and the type: a regular file, fs.ModeDir,
	// fs.ModeSymlink, or fs.ModeDevice with or without fs.ModeCharDevice.
	Mode         fs.FileMode
	Major, Minor uint32 // of a device node
	Data         []byte // content of a regular file, target of a symbolic link
}

// A Writer writes an archive. All times and owners are 0, so that equal files
// make equal archives.
type Writer struct {
	w     io.Writer
	inode uint32
}

// NewWriter returns a Writer of an archive to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write appends a file.
func (w *Writer) Write(f File) error {
	mode, err := stMode(f.Mode)
	if err == nil {
		err = w.write(f, mode)
	}
	if err != nil {
		return fmt.Errorf("cpio: %s: %w", f.Name, err)
	}
	return nil
}

// Close ends the archive. The underlying writer stays open.
func (w *Writer) Close() error {
	if err := w.write(File{Name: "TRAILER!!!"}, 0); err != nil {
		return fmt.Errorf("cpio: %w", err)
	}
	return nil
}

func (w *Writer) write(f File, mode uint32) error {
	w.inode++
	links := uint32(1)
	if f.Mode.IsDir() {
		links = 2
	}
	fields := [13]uint32{
		w.inode, mode, 0, 0, links, 0, // ino mode uid gid nlink mtime
		uint32(len(f.Data)), 0, 0, // filesize, device of the file
		f.Major, f.Minor, // device that it is
		uint32(len(f.Name) + 1), 0, // namesize with its NUL, checksum (unused)
	}
	header := []byte("070701")
	for _, v := range fields {
		header = fmt.Appendf(header, "%08X", v)
	}
	header = append(append(header, f.Name...), 0)
	if err := writePadded(w.w, header); err != nil {
		return err
	}
	return writePadded(w.w, f.Data)
}

// writePadded writes b, padded to a multiple of four bytes.
func writePadded(w io.Writer, b []byte) error {
	if _, err := w.Write(b); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, -len(b)&3))
	return err
}

// stMode returns a mode in the form of stat(2), inode(7).
func stMode(m fs.FileMode) (uint32, error) {
	types := map[fs.FileMode]uint32{
		0:                                 0o100000,
		fs.ModeDir:                        0o040000,
		fs.ModeSymlink:                    0o120000,
		fs.ModeDevice:                     0o060000,
		fs.ModeDevice | fs.ModeCharDevice: 0o020000,
	}
	t, ok := types[m.Type()]
	if !ok {
		return 0, fmt.Errorf("a file of mode %v cannot be archived", m)
	}
	mode := t | uint32(m.Perm())
	for bit, st := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= st
		}
	}
	return mode, nil
}
