// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
)

// PolicyCapabilityMemfdClass is memfd_class, which 7.3 has and 6.12 ignores (security/selinux/include/policycap.h).
// With it memfds have a class and labels of their own.
const PolicyCapabilityMemfdClass = 13

// EnablePolicyCapability adds a policy capability, by its number, to the binary policy in a file. It is for
// capabilities that secilc is too old to name. The policy must have other capabilities already.
func EnablePolicyCapability(file string, number uint) error {
	policy, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// These are the fields of the capabilities' bitmap, which follows the header (security/selinux/ss/policydb.c,
	// ebitmap.c): the size of a node's map in bits, the end of the last node, the number of nodes, and the first node's
	// start. Its map comes next.
	bitmap := []byte{64, 0, 0, 0, 64, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}
	const at = 32
	if number > 63 || len(policy) < at+len(bitmap)+8 || !bytes.Equal(policy[at:at+len(bitmap)], bitmap) {
		return fmt.Errorf("%s: the policy capabilities are not those of a policy by secilc", file)
	}
	policy[at+len(bitmap)+int(number/8)] |= 1 << (number % 8)
	return os.WriteFile(file, policy, 0o644) //nolint:gosec // nothing secret
}

// CompilePolicy makes a binary policy of CIL files with secilc. args are these files, and options of secilc.
func CompilePolicy(ctx context.Context, out string, args ...string) error {
	// Version 33 of the format is the newest that all kernels since 5.8 know. File contexts are not needed.
	args = append([]string{"-c", "33", "-o", out, "-f", os.DevNull}, args...)
	if said, err := exec.CommandContext(ctx, "secilc", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("secilc %q: %w\n%s", args, err, said)
	}
	return nil
}
