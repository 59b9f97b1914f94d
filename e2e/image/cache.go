// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// cache is a directory of finished files. Each file's name says all that the file was made from.
type cache string

func openCache() (cache, error) {
	base, err := os.UserCacheDir() // ${XDG_CACHE_HOME:-$HOME/.cache}
	if err != nil {
		return "", fmt.Errorf("guest image cache: %w", err)
	}
	dir := filepath.Join(base, "migrated")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("guest image cache: %w", err)
	}
	return cache(dir), nil
}

// file returns the path of the named file, and produces it if it is missing. If two callers do so at once, both produce
// it, and one of the equal results stays.
func (c cache) file(name string, produce func() ([]byte, error)) (string, error) {
	path := filepath.Join(string(c), name)
	_, err := os.Stat(path)
	if err == nil {
		return path, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("guest image cache: %w", err)
	}
	b, err := produce()
	if err != nil {
		return "", err
	}
	if err := writeAtomic(path, b); err != nil {
		return "", fmt.Errorf("guest image cache: %w", err)
	}
	return path, nil
}

// writeAtomic makes path appear with all of b, also across a crash.
func writeAtomic(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".making-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails, as it should, once renamed
	_, err = f.Write(b)
	// QEMU may run as another user; CreateTemp made the file private.
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
