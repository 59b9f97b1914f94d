// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// DefaultBinaries are the QEMU binaries that are started where nothing else was configured.
var DefaultBinaries = []string{"qemu-system-*", "qemu-kvm", "kvm"}

// MayRun fails where a QEMU binary is none that matches the patterns, or is not what its path says.
func MayRun(binary string, patterns []string) error {
	found, err := findBinary(binary, patterns)
	if err == nil && found != binary {
		err = fmt.Errorf("QEMU binary %q is not on this host, or not one that may be started", binary)
	}
	return err
}

// findBinary finds what a source calls name on this host: at the same path, or else in PATH.
//
// The name comes from another host, so it must match one of the patterns, and a file that an ordinary user
// could have put there does not count.
func findBinary(name string, patterns []string) (string, error) {
	if len(patterns) == 0 {
		patterns = DefaultBinaries
	}
	if filepath.IsAbs(name) {
		allowed, err := matches(name, patterns)
		if err != nil {
			return "", err
		}
		if _, statErr := os.Stat(name); allowed && statErr == nil {
			if owner, ok := onlyRootWrites(name); !ok {
				return "", fmt.Errorf("QEMU binary %s: %s can be changed by others than root, so it is not started for another host", name, owner)
			}
			return name, nil
		}
	}
	found, err := exec.LookPath(filepath.Base(name))
	if err == nil {
		found, err = filepath.Abs(found)
	}
	if err != nil {
		return "", fmt.Errorf("QEMU binary %q of the source: not on this host, neither at that path nor in PATH: %w", name, err)
	}
	allowed, err := matches(found, patterns)
	if err != nil {
		return "", err
	}
	if !allowed {
		return "", fmt.Errorf("QEMU binary %q of the source: only %s may be started here; add it to the daemon's list of binaries",
			name, strings.Join(patterns, ", "))
	}
	return found, nil
}

func matches(name string, patterns []string) (bool, error) {
	for _, pattern := range patterns {
		subject := path.Base(name)
		if strings.Contains(pattern, "/") {
			subject = name
		}
		ok, err := path.Match(pattern, subject)
		if err != nil {
			return false, fmt.Errorf("pattern of QEMU binaries %q: %w", pattern, err)
		}
		if ok {
			return true, nil
		}
	}
	return false, nil
}

// onlyRootWrites looks at a file, where it leads to, and at all directories above; it returns what others
// than root, or than this daemon's user, can write.
func onlyRootWrites(name string) (culprit string, ok bool) {
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
