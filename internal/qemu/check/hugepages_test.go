// SPDX-License-Identifier: Apache-2.0

package check

import (
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/hugepages"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// onKernel makes the code believe for this test that the kernel fills missing pages with zeros, or does not.
func onKernel(t *testing.T, fills bool) {
	t.Helper()
	collapseFillsMissing = func() (bool, error) { return fills, nil }
	t.Cleanup(func() { collapseFillsMissing = uffd.CollapseFillsMissing })
}

// TestCheckHugePages checks that the check of a host warns about the first place that permits huge pages.
func TestCheckHugePages(t *testing.T) {
	safe := []hugepages.Mount{{Point: "/run"}, {Point: "/dev/shm", Huge: "never"}}
	open := append(slices.Clone(safe), hugepages.Mount{Point: "/vms", Huge: "within_size"})
	for _, c := range []struct {
		setting string
		mounts  []hugepages.Mount
		status  Status
		says    string
	}{
		{"never", safe, OK, "no tmpfs allows"},
		{"deny", open, OK, "no tmpfs allows"},
		{"", open, OK, "no tmpfs allows"},
		{"never", open, Warning, "/vms is mounted with huge=within_size"},
		{"advise", safe, Warning, hugepages.ShmemEnabled + " is advise"},
		{"force", safe, Warning, hugepages.ShmemEnabled + " is force"},
	} {
		r := hugePagesResult(c.setting, c.mounts)
		if r.Status != c.status || !strings.HasPrefix(r.Detail, c.says) || (r.Remedy == "") != (r.Status == OK) {
			t.Errorf("%s, %v: %+v", c.setting, c.mounts, r)
		}
	}
	onKernel(t, false)
	if r := checkHugePages(); r.Status != OK {
		t.Errorf("a kernel that keeps missing pages: %+v", r)
	}
}
