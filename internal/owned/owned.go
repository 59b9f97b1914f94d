// SPDX-License-Identifier: Apache-2.0

// Package owned reports whether only root can change a file. internal/qemu/cmdline and internal/qemu/launch ask before
// they start a program for another host: a QEMU binary, or the hook for a libvirt domain.
package owned

import (
	"os"
	"path/filepath"
	"syscall"
)

// ByRoot checks a file, the targets of its symbolic links, and all directories above both. culprit is the first of them
// that others than root or this process' user can write to, or that cannot be checked.
func ByRoot(name string) (culprit string, ok bool) {
	target, err := filepath.EvalSymlinks(name)
	if err != nil {
		return name, false
	}
	for _, start := range []string{filepath.Clean(name), target} {
		for p := start; ; p = filepath.Dir(p) {
			info, err := os.Stat(p)
			if err != nil {
				return p, false
			}
			st, isUnix := info.Sys().(*syscall.Stat_t)
			// In a sticky directory, nobody else can replace what is root's.
			open := info.Mode().Perm()&0o022 != 0 && info.Mode()&os.ModeSticky == 0
			if !isUnix || st.Uid != 0 && int(st.Uid) != os.Geteuid() || open {
				return p, false
			}
			if p == filepath.Dir(p) {
				break
			}
		}
	}
	return "", true
}
