// SPDX-License-Identifier: Apache-2.0

// Package qemutest starts QEMUs for the tests of internal/qemu and of the packages below it. Only their external test
// packages (process_test, ...) can use it, because qemutest imports the packages that they test.
package qemutest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// Context returns a context that ends after a minute, or with the test.
func Context(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Binary returns the path of the installed QEMU.
func Binary(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	return path
}

// NeedRoot skips a test that needs root if the process is not root.
func NeedRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root")
	}
}

// Nobody is the number of a user and of a group without any rights.
const Nobody = 65534

// Unprivileged are the credentials of Nobody.
var Unprivileged = process.Credentials{UID: Nobody, GID: Nobody, Groups: []uint32{Nobody}}

// Sandbox is the value of -sandbox that libvirt gives its QEMUs.
const Sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// Self returns the user and group of the test process.
func Self() process.Credentials {
	return process.Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}

// Start starts a q35 machine that is killed at the end of the test.
func Start(t *testing.T, args ...string) (*launch.Process, *qemu.VM) {
	t.Helper()
	return StartWith(t, nil, Options(t, Self(), args...))
}

// StartWith starts a machine with these options, as a child of s or, when s is nil, of this process. It kills the
// machine at the end of the test.
func StartWith(t *testing.T, s *launch.Starter, opts launch.Options) (*launch.Process, *qemu.VM) {
	t.Helper()
	p, vm, err := qemu.Start(Context(t), s, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return p, vm
}

// Options returns the options to start a q35 machine as user c, in a directory of its own.
func Options(t *testing.T, c process.Credentials, args ...string) launch.Options {
	t.Helper()
	dir, err := os.MkdirTemp("", "migrated-test-") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	qmpPath := filepath.Join(dir, "qmp")
	argv := append([]string{Binary(t), "-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none",
		"-qmp", "unix:" + qmpPath + ",server=on,wait=off"}, args...)
	return launch.Options{
		Args: argv, Credentials: c, Dir: dir,
		QMPPath: qmpPath, PipePath: filepath.Join(dir, "pipe"), LogPath: filepath.Join(dir, "log"),
	}
}

// AwaitFile returns when path exists or ctx ends.
func AwaitFile(ctx context.Context, path string) {
	for ctx.Err() == nil {
		if _, err := os.Stat(path); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
