// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pidFile is the file that a QEMU with that command line, argv[0] first, writes its number to, and removes when it ends by
// itself; empty: none.
func pidFile(argv []string, dir string) (path string) {
	options, err := parseOptions(argv[1:])
	if err != nil {
		return "" // such a QEMU does not start
	}
	for _, o := range options {
		if o.name == "pidfile" {
			path = o.value
		}
	}
	if path != "" && !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	return path
}

// removePIDFile removes the file of a QEMU that was killed, because its number may be another process' one day. Another
// QEMU's by now stays.
func removePIDFile(path string, pid int) error {
	if path == "" {
		return nil
	}
	// The source has named it: it may be anything.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil //nolint:nilerr // there is none
	}
	text := make([]byte, 32)
	n, err := unix.Read(fd, text)
	if err := errors.Join(err, unix.Close(fd)); err != nil || strings.TrimSpace(string(text[:max(n, 0)])) != strconv.Itoa(pid) {
		return nil //nolint:nilerr // there is none of this QEMU's
	}
	return os.Remove(path)
}
