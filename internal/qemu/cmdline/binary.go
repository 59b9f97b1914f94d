// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/migrated-vm/migrated/internal/owned"
)

// ErrNoBinaries says that this host starts no QEMU for another host.
var ErrNoBinaries = errors.New("the destination starts no QEMU: its list of QEMU binaries is empty")

// MayRun returns an error unless binary is the path of a QEMU on this host that matches one of the patterns.
func MayRun(binary string, patterns []string) error {
	found, err := FindBinary(binary, patterns)
	if err == nil && found != binary {
		err = fmt.Errorf("QEMU binary %q is not on the destination, or not one that may be started", binary)
	}
	return err
}

// FindBinary returns the path on this host of the QEMU that a source calls name: the same path, or else the base name
// in PATH.
//
// The name comes from another host. So the path must match one of the patterns, and an absolute path that others than
// root can change is refused. No pattern allows no binary: ErrNoBinaries.
func FindBinary(name string, patterns []string) (string, error) {
	if len(patterns) == 0 {
		return "", ErrNoBinaries
	}
	if filepath.IsAbs(name) {
		allowed, err := matches(name, patterns)
		if err != nil {
			return "", err
		}
		if _, statErr := os.Stat(name); allowed && statErr == nil {
			if owner, ok := owned.ByRoot(name); !ok {
				return "", fmt.Errorf("QEMU binary %s: %s can be changed by others than root, "+
					"so it is not started for another host", name, owner)
			}
			return name, nil
		}
	}
	found, err := exec.LookPath(filepath.Base(name))
	if err == nil {
		found, err = filepath.Abs(found)
	}
	if err != nil {
		return "", fmt.Errorf("QEMU binary %q of the source: "+
			"not on the destination, neither at that path nor in PATH: %w", name, err)
	}
	allowed, err := matches(found, patterns)
	if err != nil {
		return "", err
	}
	if !allowed {
		return "", fmt.Errorf("QEMU binary %q of the source: only %s may be started here; "+
			"add it to the daemon's list of binaries", name, strings.Join(patterns, ", "))
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
