// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"os"
	"testing"
)

// The debug kernel does what the patched one does, and survives tests that are too rough for a kernel that does not
// check itself. Boot fails if it complains.
func TestAssertionsDebug(t *testing.T) {
	eachVersion(t, func(t *testing.T, version Version) {
		needDebug(t, version)
		assert(t, version, Debug, allPoints()...)
	})
}

// args returns what a variant needs of QEMU besides, or nothing.
//
// With five levels of page tables KASAN complains of a wild access in some boots: an interrupt comes while identify_cpu
// has just cleared the CPU's features, and KASAN asks them how large the address space is (__VIRTUAL_MASK_SHIFT;
// arch/x86/kernel/cpu/common.c in 7.3.4).
func (v Variant) args() []string {
	if v == Debug {
		return []string{"-cpu", "max,la57=off"}
	}
	return nil
}

// needDebug skips a test that boots the debug kernel of a version, unless it is asked for. That kernel takes longer to
// build than the other two of the version, and long to run.
func needDebug(t *testing.T, version Version) {
	t.Helper()
	if os.Getenv("DEBUG") != "1" {
		t.Skipf("the debug kernel takes long: 'make -C kernel debug KERNEL=%s' builds it and runs this", version)
	}
}
