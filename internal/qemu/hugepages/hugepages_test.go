// SPDX-License-Identifier: Apache-2.0

package hugepages

import (
	"strings"
	"testing"
)

// TestHugePagesSettings checks that memory on no mounted tmpfs follows the kernel's setting, and that "deny" and
// "force" override a tmpfs mount option.
func TestHugePagesSettings(t *testing.T) {
	kernel := func(setting string) Place { return Place{Setting: setting} }
	mounted := func(setting, huge string) Place { return Place{setting, &Mount{Point: "/x", Huge: huge}} }
	for _, c := range []struct {
		where     Place
		permitted bool
		remedy    string
	}{
		{kernel("never"), false, ""},
		{kernel("deny"), false, ""},
		{kernel("always"), true, "echo never > " + ShmemEnabled},
		{kernel("within_size"), true, "echo never > " + ShmemEnabled},
		{kernel("advise"), true, "echo never > " + ShmemEnabled},
		{kernel("force"), true, "echo never > " + ShmemEnabled},
		{mounted("always", ""), false, ""},
		{mounted("always", "never"), false, ""},
		{mounted("never", "always"), true, "mount -o remount,huge=never /x"},
		{mounted("never", "within_size"), true, "mount -o remount,huge=never /x"},
		{mounted("never", "advise"), true, "mount -o remount,huge=never /x"},
		{mounted("deny", "always"), false, ""},
		{mounted("force", "never"), true, "echo never > " + ShmemEnabled},
	} {
		if got := c.where.Permitted(); got != c.permitted {
			t.Errorf("%+v: permitted %t", c.where, got)
		}
		if c.permitted && !strings.HasSuffix(c.where.Remedy(), c.remedy) {
			t.Errorf("%+v: %s", c.where, c.where.Remedy())
		}
	}
}
