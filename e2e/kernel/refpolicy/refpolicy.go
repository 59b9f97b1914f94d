// SPDX-License-Identifier: Apache-2.0

// Package refpolicy has the SELinux policy of a Debian 12 host, for tests that compile something together with
// it.
package refpolicy

import (
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
)

const (
	pkg     = "selinux-policy-default"
	version = "2:2.20221101-9"

	// toCIL, of policycoreutils, turns a compiled module into CIL, as semodule does.
	toCIL = "/usr/libexec/selinux/hll/pp"
)

// Modules returns all modules of the policy as CIL files. The package is downloaded once, into the user's cache,
// and never installed.
func Modules(ctx context.Context) ([]string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("policy of Debian: %w", err)
	}
	dir := filepath.Join(cache, "migrated", pkg+"-"+strings.ReplaceAll(version, ":", "_"))
	if _, err = os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		err = fetch(ctx, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("policy of Debian: %w", err)
	}
	modules, err := filepath.Glob(filepath.Join(dir, "*.cil"))
	if err == nil && len(modules) < 300 {
		err = fmt.Errorf("%s holds %d modules: remove it and try again", dir, len(modules))
	}
	if err != nil {
		return nil, fmt.Errorf("policy of Debian: %w", err)
	}
	return modules, nil
}

// fetch makes dir appear whole.
func fetch(ctx context.Context, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".making-"+pkg+"-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := run(ctx, work, "apt-get", "download", "--quiet", pkg+"="+version); err != nil {
		return err
	}
	packages, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err == nil && len(packages) != 1 {
		err = fmt.Errorf("apt-get downloaded %q", packages)
	}
	if err != nil {
		return err
	}
	if err := run(ctx, work, "dpkg-deb", "--extract", packages[0], "root"); err != nil {
		return err
	}
	made := filepath.Join(work, "cil")
	if err := convert(ctx, filepath.Join(work, "root/usr/share/selinux/default"), made); err != nil {
		return err
	}
	if err := os.Rename(made, dir); err != nil && !errors.Is(err, os.ErrExist) { // or somebody was faster
		return err
	}
	return nil
}

func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, said)
	}
	return nil
}

// convert makes a CIL file in the new directory to of each compiled module in from.
func convert(ctx context.Context, from, to string) error {
	modules, err := filepath.Glob(filepath.Join(from, "*.pp.bz2"))
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for _, module := range modules {
		name := strings.TrimSuffix(filepath.Base(module), ".pp.bz2")
		group.Go(func() error { return convertOne(ctx, module, filepath.Join(to, name+".cil")) })
	}
	return group.Wait()
}

func convertOne(ctx context.Context, module, cil string) error {
	in, err := os.Open(module)
	if err != nil {
		return err
	}
	defer in.Close()
	cmd := exec.CommandContext(ctx, toCIL)
	cmd.Stdin = bzip2.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s to CIL: %w", filepath.Base(module), err)
	}
	return os.WriteFile(cil, out, 0o644)
}
