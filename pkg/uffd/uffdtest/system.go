// SPDX-License-Identifier: Apache-2.0

package uffdtest

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

const hugePageSize = 2 << 20

// Need checks that the kernel has the features. If it is too old for them, Need skips the test with the reason.
// Otherwise a missing feature is testenv.CannotRun.
func Need(t testing.TB, want uffd.Features) {
	t.Helper()
	need(t, uffd.HaveFeatures(want))
}

// NeedCategories is Need for categories of pages.
func NeedCategories(t testing.TB, want uffd.Categories) {
	t.Helper()
	need(t, uffd.HaveCategories(want))
}

func need(t testing.TB, err error) {
	t.Helper()
	var missing *uffd.NotSupportedError
	if errors.As(err, &missing) && older(t, missing.MinKernel) {
		t.Skip(err)
	}
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
}

// older reports whether the running kernel is older than release, for example "6.7".
func older(t testing.TB, release string) bool {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor, wantMajor, wantMinor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(release, "%d.%d", &wantMajor, &wantMinor); err != nil {
		t.Fatalf("release %q: %v", release, err)
	}
	return major < wantMajor || major == wantMajor && minor < wantMinor
}

// ReserveHugePages adds n huge pages of 2 MiB to those that the machine has, until the test ends.
func ReserveHugePages(t testing.TB, n int) {
	t.Helper()
	testenv.ReserveHugePages(t, hugePageSize, n)
}

// CheckDescriptors fails the test if this process has descriptors open at the test's end that it does not have
// now. Call it first: cleanups run in reverse order.
func CheckDescriptors(t testing.TB) {
	t.Helper()
	if r, w, err := os.Pipe(); err == nil { // the runtime's poller opens descriptors on first use
		r.Close()
		w.Close()
	}
	before := descriptors(t)
	t.Cleanup(func() {
		for fd, target := range descriptors(t) {
			if before[fd] != target {
				t.Errorf("descriptor leaked: %s -> %s", fd, target)
			}
		}
	})
}

func descriptors(t testing.TB) map[string]string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]string{}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err == nil { // the directory's own descriptor is gone by now
			open[e.Name()] = target
		}
	}
	// The compiled child stays for the whole test binary.
	maps.DeleteFunc(open, func(_, target string) bool { return strings.Contains(target, memfdName) })
	return open
}

// String formats the result for failure messages.
func (r Result) String() string { return fmt.Sprintf("value %#x, errno %v", r.Value, r.Errno) }
