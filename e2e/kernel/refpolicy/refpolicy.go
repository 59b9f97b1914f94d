// SPDX-License-Identifier: Apache-2.0

// Package refpolicy provides the SELinux policy of a Debian 12 host, for tests that compile something together with it.
package refpolicy

import (
	"compress/bzip2"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/migrated-vm/migrated/e2e/debian"
)

const (
	pkg     = "selinux-policy-default"
	version = "2:2.20221101-9"

	// toCIL is policycoreutils' program that turns a compiled module into CIL, as semodule does.
	toCIL = "/usr/libexec/selinux/hll/pp"
)

// Modules returns all modules of the policy as CIL files. The package is downloaded once, into the user's cache,
// and never installed.
func Modules(ctx context.Context) ([]string, error) {
	dir, err := debian.Keep("cil-"+pkg+"-"+version, func(made string) error {
		root, err := debian.Extract(ctx, pkg, version)
		if err != nil {
			return err
		}
		return convert(ctx, filepath.Join(root, "usr/share/selinux/default"), made)
	})
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

// convert makes a CIL file in the directory to for each compiled module in from.
func convert(ctx context.Context, from, to string) error {
	modules, err := filepath.Glob(filepath.Join(from, "*.pp.bz2"))
	if err != nil {
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
