// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// removePIDFile removes the pidfile of a QEMU that was killed, because its PID may be reused. It keeps a file that
// holds the PID of another QEMU.
func removePIDFile(path string, pid int) error {
	if path == "" {
		return nil
	}
	// The path comes from the source's command line. It may lead to any kind of file.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil //nolint:nilerr // there is no such file
	}
	text := make([]byte, 32)
	n, err := unix.Read(fd, text)
	if err := errors.Join(err, unix.Close(fd)); err != nil ||
		strings.TrimSpace(string(text[:max(n, 0)])) != strconv.Itoa(pid) {
		return nil //nolint:nilerr // it is not the file of this QEMU
	}
	return os.Remove(path)
}
