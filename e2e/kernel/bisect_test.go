// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// Somebody who bisects the kernel may stop after any patch of the series: each
// of those kernels must build and boot. 'make -C kernel bisect' asks for it.
func TestEachPatchBoots(t *testing.T) {
	if os.Getenv("BISECT") != "1" {
		t.Skip("a kernel per patch takes long: 'make -C kernel bisect' does it")
	}
	needQEMU(t)
	patches, err := filepath.Glob("../../kernel/patches/*.patch")
	if err != nil || len(patches) < 2 {
		t.Fatalf("patches %q, %v", patches, err)
	}
	for i, patch := range patches[1:] { // the first is the cover letter
		t.Run(filepath.Base(patch), func(t *testing.T) {
			for _, v := range []Variant{Patched, Debug} {
				tree, err := build(t.Context(), string(v), strconv.Itoa(i+1))
				if err != nil {
					t.Fatal(err)
				}
				boots(t, v, tree)
			}
		})
	}
}
