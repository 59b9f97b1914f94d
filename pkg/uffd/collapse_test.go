// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCollapseFillsMissing checks that the running kernel's answer is that of its version. e2e/kernel/hugepages boots
// kernels of both kinds and checks that the answers are true.
func TestCollapseFillsMissing(t *testing.T) {
	fills, err := CollapseFillsMissing()
	if err != nil {
		t.Fatal(err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	v, err := parseRelease(unix.ByteSliceToString(name.Release[:]))
	if err != nil {
		t.Fatal(err)
	}
	if want := v.less(collapseRespects); fills != want {
		t.Errorf("Linux %v: %t, want %t", v, fills, want)
	}
	// Where the kernel can be tried, the answer is the same.
	asked, err := askCollapse()
	if errors.Is(err, unix.EINVAL) {
		t.Skip(err) // the kernel is too old, or huge pages of shared memory are denied
	}
	if err != nil || asked != fills {
		t.Errorf("askCollapse = %t, %v", asked, err)
	}
}

func TestParseRelease(t *testing.T) {
	for release, want := range map[string]kernelVersion{
		"6.1.0-57-cloud-amd64": {6, 1}, "5.15.0": {5, 15}, "6.12.117+deb12-cloud-amd64": {6, 12}, "7.0-rc1": {7, 0},
	} {
		if v, err := parseRelease(release); err != nil || v != want {
			t.Errorf("%s: %v, %v", release, v, err)
		}
	}
	if v, err := parseRelease("unknown"); err == nil {
		t.Errorf("unknown: %v", v)
	}
}
