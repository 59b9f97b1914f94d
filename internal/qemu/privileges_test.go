// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestStartsAs(t *testing.T) {
	needRoot(t)
	runs := Credentials{UID: 998, GID: 997, Groups: []uint32{104}}
	for args, want := range map[string]Credentials{
		"":                        runs,
		"-m 64 -chroot /c":        runs,
		"-runas incus":            {},
		"--runas 998:997":         {},
		"-append -runas -m 64":    runs, // the kernel's, not QEMU's
		"-run-with user=incus":    {},
		"-run-with chroot=/c":     runs,
		`-run-with {"user":"u"}`:  {},
		"-run-with user=u -m 64":  {},
		"-name -runas -m 64":      runs,
		"-run-with chroot=user=u": runs,
	} {
		got, err := StartsAs(append([]string{"qemu-system-test"}, strings.Fields(args)...), runs)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v, -want +got:\n%s", args, err, diff)
		}
	}
	if _, err := StartsAs([]string{"qemu-system-test", "-runas"}, runs); err == nil {
		t.Error("an option without its value is no error")
	}
}

func TestCheckUser(t *testing.T) {
	f := Facts{UID: 998, GID: 997, Groups: []uint32{104}}
	if err := f.CheckUser(Credentials{UID: 998, GID: 997}); err != nil {
		t.Error(err)
	}
	var other *UserError
	err := f.CheckUser(Credentials{UID: 999, GID: 997})
	if !errors.As(err, &other) || other.Here.UID != 998 || other.Source.UID != 999 {
		t.Errorf("another user: %v", err)
	}
}
