// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// A bisection of the kernel may stop after any patch of the series, so each of those kernels must build and boot.
// 'make -C kernel bisect' runs this.
func TestEachPatchBoots(t *testing.T) {
	if os.Getenv("BISECT") != "1" {
		t.Skip("a kernel per patch takes long: 'make -C kernel bisect' does it")
	}
	needQEMU(t)
	eachVersion(t, func(t *testing.T, version Version) {
		patches, err := filepath.Glob("../../kernel/patches/" + string(version) + "/*.patch")
		if err != nil || len(patches) < 2 {
			t.Fatalf("patches %q, %v", patches, err)
		}
		for i, patch := range patches[1:] { // the first is the cover letter
			t.Run(filepath.Base(patch), func(t *testing.T) {
				for _, v := range []Variant{Patched, Debug} {
					tree, err := build(t.Context(), string(version), string(v), strconv.Itoa(i+1))
					if err != nil {
						t.Fatal(err)
					}
					boots(t, version, v, tree)
				}
			})
		}
	})
}
