// SPDX-License-Identifier: Apache-2.0

// Package debian extracts Debian packages for tests, and installs none of them.
package debian

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Extract returns a directory with the files of a package. The package is downloaded once, into the user's cache.
func Extract(ctx context.Context, pkg, version string) (string, error) {
	return Keep(pkg+"-"+version, func(made string) error {
		work, err := os.MkdirTemp("", "migrated-"+pkg+"-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(work)
		archive, err := Download(ctx, work, pkg, version)
		if err != nil {
			return err
		}
		return run(ctx, work, "dpkg-deb", "--extract", archive, made)
	})
}

// Download downloads a package into an empty directory, and returns its path. It needs Debian's package lists.
func Download(ctx context.Context, dir, pkg, version string) (string, error) {
	if err := run(ctx, dir, "apt-get", "download", "--quiet", pkg+"="+version); err != nil {
		return "", fmt.Errorf("%w (are the package lists too old? apt-get update)", err)
	}
	packages, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err == nil && len(packages) != 1 {
		err = fmt.Errorf("apt-get downloaded %q", packages)
	}
	if err != nil {
		return "", err
	}
	return packages[0], nil
}

// Installed returns the version of an installed package.
func Installed(ctx context.Context, pkg string) (string, error) {
	out, err := exec.CommandContext(ctx, "dpkg-query", "--show", "--showformat=${Version}", pkg).Output()
	if err != nil {
		return "", fmt.Errorf("the version of %s: %w", pkg, err)
	}
	return string(out), nil
}

// Keep returns a directory in the user's cache, and makes it if it is missing: fill fills a new directory, which then
// appears with all of its content. name must say all that the content is made from. If two callers do so at once, both
// fill a directory, and one of the equal results stays.
func Keep(name string, fill func(dir string) error) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "migrated", strings.ReplaceAll(name, ":", "_"))
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".making-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	made := filepath.Join(work, "made")
	if err := os.Mkdir(made, 0o755); err != nil {
		return "", err
	}
	if err := fill(made); err != nil {
		return "", err
	}
	if err := os.Rename(made, dir); err != nil && !errors.Is(err, fs.ErrExist) { // or another caller was faster
		return "", err
	}
	return dir, nil
}

func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, said)
	}
	return nil
}
