// SPDX-License-Identifier: Apache-2.0

package uffdtest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

const (
	hugePageSize  = 2 << 20
	hugePagesFile = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
)

// Need makes sure that the kernel has the features.
func Need(t testing.TB, want uffd.Features) {
	t.Helper()
	if err := uffd.HaveFeatures(want); err != nil {
		cannot.Run(t, "%v", err)
	}
}

// ReserveHugePages adds n huge pages of 2 MiB to the pool until the test ends.
func ReserveHugePages(t testing.TB, n int) {
	t.Helper()
	before, err := hugePages()
	if err != nil {
		cannot.Run(t, "no 2 MiB huge pages: %v", err)
	}
	set := func(n int) error { return os.WriteFile(hugePagesFile, []byte(strconv.Itoa(n)), 0o644) }
	if err := set(before + n); err != nil {
		cannot.Run(t, "cannot reserve huge pages: %v", err)
	}
	t.Cleanup(func() {
		if err := set(before); err != nil {
			t.Errorf("give the huge pages back: %v", err)
		}
	})
	if now, err := hugePages(); err != nil || now < before+n {
		cannot.Run(t, "the kernel gave %d of %d huge pages (%v)", now-before, n, err)
	}
}

func hugePages() (int, error) {
	b, err := os.ReadFile(hugePagesFile)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// CheckDescriptors fails the test if at its end this process has descriptors open that it did not have
// now. Call it first: cleanups run in reverse.
func CheckDescriptors(t testing.TB) {
	t.Helper()
	if r, w, err := os.Pipe(); err == nil { // the runtime's poller opens its own on first use
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

// String makes failures readable.
func (r Result) String() string { return fmt.Sprintf("value %#x, errno %v", r.Value, r.Errno) }
