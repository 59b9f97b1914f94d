// SPDX-License-Identifier: Apache-2.0

package libvirt

import "testing"

func TestAddress(t *testing.T) {
	for vm, want := range map[string]struct {
		isAddress    bool
		socket, name string // empty: it is refused
	}{
		"libvirt:db":      {true, "", "db"},
		"libvirt:":        {true, "", ""},
		"/run/libvirt:db": {},
		"":                {},
		"libvirt+unix:///db?socket=/run/other-sock":         {true, "/run/other-sock", "db"},
		"libvirt+unix:///a%20b?socket=%2Frun%2Fa%26b":       {true, "/run/a&b", "a b"},
		"libvirt+unix:///db":                                {true, "", ""},
		"libvirt+unix:///db?socket=relative":                {true, "", ""},
		"libvirt+unix:///?socket=/run/other-sock":           {true, "", ""},
		"libvirt+unix://host/db?socket=/run/other-sock":     {true, "", ""},
		"libvirt+unix:///db?socket=/run/sock&mode=readonly": {true, "", ""},
		"libvirt+unix:db":                                   {true, "", ""},
	} {
		if IsAddress(vm) != want.isAddress {
			t.Errorf("%q is an address of libvirt's: %v", vm, !want.isAddress)
		}
		if !want.isAddress {
			continue
		}
		socket, name, err := parseAddress(vm)
		if (err == nil) != (want.name != "") || socket != want.socket || name != want.name {
			t.Errorf("%q: %q at %q, %v", vm, name, socket, err)
		}
		if err == nil && Address(socket, name) != vm && vm != "libvirt+unix:///db?socket=/run/other-sock" {
			t.Errorf("%q is written %q", vm, Address(socket, name))
		}
	}
}

func TestAt(t *testing.T) {
	for _, test := range []struct{ socket, vm, want string }{
		{"", "libvirt:db", "libvirt:db"},
		{"/run/sock", "libvirt:db", "libvirt+unix:///db?socket=%2Frun%2Fsock"},
		{"/run/sock", "libvirt+unix:///db?socket=/other", "libvirt+unix:///db?socket=/other"},
		{"/run/sock", "/run/qmp", "/run/qmp"},
	} {
		if got := At(test.socket, test.vm); got != test.want {
			t.Errorf("%q at %q is %q, want %q", test.vm, test.socket, got, test.want)
		}
	}
}

func TestUUID(t *testing.T) {
	const text = "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11"
	uuid, ok := parseUUID(text)
	if !ok || uuid[0] != 0x9f || uuid[15] != 0x11 || formatUUID(uuid) != text {
		t.Errorf("%x, %v", uuid, ok)
	}
	if _, ok := parseUUID("a name of thirty-six letters in all.."); ok {
		t.Error("a name is taken for a UUID")
	}
}
