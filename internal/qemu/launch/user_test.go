// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

func TestStartsAs(t *testing.T) {
	qemutest.NeedRoot(t)
	runs := process.Credentials{UID: 998, GID: 997, Groups: []uint32{104}}
	for args, want := range map[string]process.Credentials{
		"":                        runs,
		"-m 64 -chroot /c":        runs,
		"-runas incus":            {},
		"--runas 998:997":         {},
		"-append -runas -m 64":    runs, // an argument of the guest's kernel, not of QEMU
		"-run-with user=incus":    {},
		"-run-with chroot=/c":     runs,
		`-run-with {"user":"u"}`:  {},
		"-run-with user=u -m 64":  {},
		"-name -runas -m 64":      runs,
		"-run-with chroot=user=u": runs,
	} {
		got, err := launch.StartsAs(append([]string{"qemu-system-test"}, strings.Fields(args)...), runs)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v, -want +got:\n%s", args, err, diff)
		}
	}
	if _, err := launch.StartsAs([]string{"qemu-system-test", "-runas"}, runs); err == nil {
		t.Error("an option without its value is no error")
	}
}
