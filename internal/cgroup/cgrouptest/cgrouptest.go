// SPDX-License-Identifier: Apache-2.0

// Package cgrouptest makes control groups for tests.
package cgrouptest

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// mounts are the mount points where memory may be limited, each with the name of the file that sets the limit.
var mounts = map[string]string{
	"/sys/fs/cgroup":         "memory.max",
	"/sys/fs/cgroup/memory":  "memory.limit_in_bytes",
	"/sys/fs/cgroup/unified": "memory.max",
}

// Limited makes a group with that limit of memory, in bytes, and returns its directory. It is removed at the end of the
// test, which must leave no process in it.
func Limited(t *testing.T, name string, bytes int) (dir string) {
	t.Helper()
	for mount, file := range mounts {
		made := filepath.Join(mount, name)
		if !isCgroup(mount) || os.Mkdir(made, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { Remove(t, made) })
		if os.WriteFile(filepath.Join(made, file), []byte(strconv.Itoa(bytes)), 0) == nil {
			return made
		}
	}
	testenv.CannotRun(t, "no control group can be made here that limits memory")
	return ""
}

// isCgroup says whether groups can be made in a directory. With version 1, /sys/fs/cgroup itself is a tmpfs.
func isCgroup(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && (fs.Type == unix.CGROUP_SUPER_MAGIC || fs.Type == unix.CGROUP2_SUPER_MAGIC)
}

// RemoveAll removes the groups of that name in all mounts, and the groups below them.
func RemoveAll(t *testing.T, name string) {
	t.Helper()
	for mount := range mounts {
		below, _ := filepath.Glob(filepath.Join(mount, name, "*", "cgroup.procs")) // the pattern is well-formed
		for _, procs := range append(below, filepath.Join(mount, name, "cgroup.procs")) {
			if _, err := os.Stat(procs); err == nil {
				Remove(t, filepath.Dir(procs))
			}
		}
	}
}

// Remove removes one group. It waits up to two minutes for its last processes to end.
func Remove(t *testing.T, dir string) {
	t.Helper()
	err := unix.Rmdir(dir)
	for end := time.Now().Add(2 * time.Minute); errors.Is(err, unix.EBUSY) &&
		time.Now().Before(end); err = unix.Rmdir(dir) {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("control group %s: %v", dir, err)
	}
}
