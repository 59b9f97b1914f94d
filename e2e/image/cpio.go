// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"io"
)

// An initramfs is a cpio archive in the "newc" format, described in the
// kernel's Documentation/driver-api/early-userspace/buffer-format.rst: per
// file a header of 13 hexadecimal fields, the name and the content, each padded
// to four bytes.

// cpioFile is one file of an initramfs.
type cpioFile struct {
	name         string // without leading slash
	mode         uint32 // st_mode: type and permissions
	major, minor uint32 // of a device node
	data         []byte
}

// File types of st_mode, inode(7).
const (
	modeDir  = 0o040000
	modeChar = 0o020000
	modeFile = 0o100000
)

// writeCPIO writes files and the trailer. Times and owners are 0, so that the
// same files make the same archive.
func writeCPIO(w io.Writer, files []cpioFile) error {
	for i, f := range append(files[:len(files):len(files)], cpioFile{name: "TRAILER!!!"}) {
		if err := writeCPIOFile(w, uint32(i+1), f); err != nil {
			return fmt.Errorf("cpio: %s: %w", f.name, err)
		}
	}
	return nil
}

func writeCPIOFile(w io.Writer, inode uint32, f cpioFile) error {
	links := uint32(1)
	if f.mode&modeDir == modeDir {
		links = 2
	}
	fields := [13]uint32{
		inode, f.mode, 0, 0, links, 0, // ino mode uid gid nlink mtime
		uint32(len(f.data)), 0, 0, // filesize, device of the file
		f.major, f.minor, // device that it is
		uint32(len(f.name) + 1), 0, // namesize with its NUL, checksum (unused)
	}
	if _, err := io.WriteString(w, "070701"); err != nil {
		return err
	}
	for _, v := range fields {
		if _, err := fmt.Fprintf(w, "%08X", v); err != nil {
			return err
		}
	}
	const header = 6 + 13*8
	if err := writePadded(w, header, append([]byte(f.name), 0)); err != nil {
		return err
	}
	return writePadded(w, 0, f.data)
}

// writePadded writes b and pads what now ends at offset+len(b) to four bytes.
func writePadded(w io.Writer, offset int, b []byte) error {
	if _, err := w.Write(b); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, -(offset+len(b))&3))
	return err
}
